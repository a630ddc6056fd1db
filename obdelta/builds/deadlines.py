"""Time limits for work on layers, by size: hostile contents must not hold a build slot for long."""

from __future__ import annotations

FLOOR_SECONDS = 60.0
"""Seconds that any work may take: a busy machine, a slow disk."""
SECONDS_PER_MB = 2.0
"""Seconds that each MB (1,000,000 bytes, inflated) adds. Ordinary layers take a fortieth of it."""


def work_seconds(size: int, most: float) -> float:
    """Returns the seconds for work on ``size`` inflated bytes, never more than ``most``
    (``build-timeout``).
    """
    return min(most, FLOOR_SECONDS + SECONDS_PER_MB * size / 1_000_000)
