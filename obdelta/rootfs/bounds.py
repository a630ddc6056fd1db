"""Limits of one image that is unpacked: its entries, its bytes, and the work on its paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from obdelta.errors import LayerInvalid

FLOOR_STEPS, STEPS_EACH = 1_000_000, 1_000
"""Steps that any image may take, and that each of its entries may add. Real images stay under 50 an
entry.
"""
FLOOR_IMPLIED, IMPLIED_EACH = 10_000, 4
"""Directories without an entry of their own that any image may have, and that each entry may add.
"""


class Limits(NamedTuple):
    """Limits of one image: ``entries`` over all layers, and ``size`` in bytes of all files, with
    holes.
    """

    entries: int = 1_000_000
    size: int = 1 << 38


DEFAULT_LIMITS = Limits()


class Bounds:
    """Counts over all layers of an image. ``progress`` gets the bytes of files so far."""

    def __init__(self, limits: Limits, progress: Callable[[int], None] | None) -> None:
        self._limits, self._progress = limits, progress
        self.entries = self.implied = self.size = 0

    def entry(self, what: object) -> None:
        """Counts one more entry. Raises LayerInvalid."""
        self.entries += 1
        if self.entries > self._limits.entries:
            raise LayerInvalid(what, f"the image has more than {self._limits.entries} entries")

    def implied_directory(self, what: object) -> None:
        """Counts a directory that a path implies and no entry describes. Raises LayerInvalid.

        One path of 500 bytes can imply 250 directories.
        """
        self.entry(what)
        self.implied += 1
        if self.implied > FLOOR_IMPLIED + IMPLIED_EACH * (self.entries - self.implied):
            raise LayerInvalid(what, "the image has too many directories without an entry")

    def steps(self, steps: int, what: object) -> None:
        """Checks the steps so far against the entries so far. Raises LayerInvalid.

        A step is a path component looked up, a directory opened, or a name listed or dropped.
        """
        if steps > FLOOR_STEPS + STEPS_EACH * self.entries:
            raise LayerInvalid(what, "its paths and links take too much work to follow")

    def content(self, size: int, what: object) -> None:
        """Counts a file of ``size`` bytes. Raises LayerInvalid."""
        self.size += size
        if self.size > self._limits.size:
            raise LayerInvalid(
                what, f"the image has more than {self._limits.size} bytes of files, holes included"
            )
        if self._progress is not None:
            self._progress(self.size)
