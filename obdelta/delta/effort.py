"""Effort levels of a build and their parameters. ``docs/delta-format.md`` has measured figures."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from obdelta.delta.kernel.binding import ffi

KB, MB = 1024, 1024 * 1024


class Effort(enum.Enum):
    """The setting ``effort``: trades building time for bytes and for the number of copies on
    devices.
    """

    FAST = "fast"
    BALANCED = "balanced"
    SMALL = "small"


@dataclass(frozen=True)
class Tuning:
    """The parameters of an effort. Sizes are in bytes; ``c`` is the kernel's ``od_effort``."""

    c: Any
    chunk: int
    """Target bytes that are searched in one task."""
    level: int
    """libdeflate's level."""
    sample_all: bool
    """Whether all of the base is searched, however unlikely a match is."""


def _tuning(level: int, *, sample_all: bool = False, **c: int) -> Tuning:
    return Tuning(ffi.new("od_effort *", c), 4 * MB, level, sample_all)


TUNINGS = {
    Effort.FAST: _tuning(
        6,
        key=8,
        step=12,
        gap=32,
        trust_gap=16,
        trust_run=16,
        shortest=24,
        unit=256 * KB,
        pad_floor=512,
        pad_ratio=1,
        pad_most=16 * KB,
        window_ratio=4,
        copy_toll=6500,
        densest=48,
        passes=1,
    ),
    Effort.BALANCED: _tuning(
        7,
        key=8,
        step=8,
        gap=32,
        trust_gap=8,
        trust_run=16,
        shortest=12,
        unit=256 * KB,
        pad_floor=2 * KB,
        pad_ratio=4,
        pad_most=64 * KB,
        window_ratio=6,
        copy_toll=3300,
        densest=32,
        passes=1,
    ),
    Effort.SMALL: _tuning(
        12,
        key=6,
        step=1,
        gap=64,
        trust_gap=0,
        trust_run=0,
        shortest=6,
        unit=1 * MB,
        pad_floor=64 * KB,
        pad_ratio=8,
        pad_most=1 * MB,
        window_ratio=12,
        copy_toll=600,
        densest=12,
        passes=3,
        sample_all=True,
    ),
}
