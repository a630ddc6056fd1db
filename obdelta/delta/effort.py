"""How hard to try. ``docs/delta-format.md`` has the measured figures."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from obdelta.delta.kernel import ffi

MB = 1024 * 1024


class Effort(enum.Enum):
    """The setting ``effort``: building time against bytes, and against the number of copies that devices make."""

    FAST = "fast"
    BALANCED = "balanced"
    SMALL = "small"


@dataclass(frozen=True)
class Tuning:
    """What an effort means. Sizes in bytes; ``c`` is the kernel's ``od_effort``."""

    c: Any
    chunk: int
    """Target bytes that are searched in one task."""
    window_floor: int
    window_ratio: int
    window_most: int
    """Base bytes that a task is searched in: the floor, and so many times its own, at most ``window_most``."""
    stems: int
    """Old entries of a like name that are looked at."""
    regions: int
    """Regions of 64 KB that the coarse index may name for a task."""
    level: int
    """libdeflate's."""


def _tuning(chunk: int, windows: tuple[int, int, int], stems: int, regions: int, level: int, **c: int) -> Tuning:
    return Tuning(ffi.new("od_effort *", c), chunk, *windows, stems, regions, level)


TUNINGS = {
    Effort.FAST: _tuning(
        4 * MB, (2 * MB, 2, 16 * MB), 1, 64, 6,
        key=8, step=4, gap=32, trust_gap=16, trust_run=16, shortest=24, copy_price=2600, far_price=500, near_price=0,
        literal_price=400, literal_scale=230,
    ),
    Effort.BALANCED: _tuning(
        4 * MB, (4 * MB, 3, 24 * MB), 2, 256, 9,
        key=8, step=1, gap=32, trust_gap=8, trust_run=24, shortest=12, copy_price=2600, far_price=500, near_price=0,
        literal_price=400, literal_scale=230,
    ),
    Effort.SMALL: _tuning(
        4 * MB, (8 * MB, 4, 32 * MB), 3, 512, 12,
        key=6, step=1, gap=64, trust_gap=0, trust_run=0, shortest=6, copy_price=1900, far_price=500, near_price=0,
        literal_price=350, literal_scale=230,
    ),
}  # fmt: skip
