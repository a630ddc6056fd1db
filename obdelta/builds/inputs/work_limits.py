"""Limits of the work on layers: its seconds, and the bytes that layers may inflate to."""

from __future__ import annotations

FLOOR_SECONDS = 60.0
"""Seconds that any work may take: a busy machine, a slow disk."""
SECONDS_PER_MB = 2.0
"""Seconds that each MB (1,000,000 bytes, inflated) adds. Ordinary layers take a fortieth of that
time.
"""


def work_seconds(size: int, most: float) -> float:
    """Returns the seconds for work on ``size`` inflated bytes, never more than ``most``
    (``build-timeout``).
    """
    return min(most, FLOOR_SECONDS + SECONDS_PER_MB * size / 1_000_000)


INFLATE_FLOOR = 64 * 1024 * 1024
INFLATE_RATIO = 256
"""A layer may inflate to INFLATE_FLOOR bytes plus INFLATE_RATIO times its declared (compressed)
size. Real layers stay under a ratio of 20; deflate's own limit is 1032.
"""


def inflate_limit(compressed: int, most: int) -> int:
    """Returns how many bytes blobs of ``compressed`` bytes may inflate to.

    ``most`` is what ``max-image`` allows.
    """
    return min(most, INFLATE_FLOOR + INFLATE_RATIO * compressed)
