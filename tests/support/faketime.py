"""A server whose time of day the test sets, by Debian's faketime; its monotonic clock is the
machine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


def library() -> Path:
    """Returns the library that faketime preloads; its directory depends on the architecture."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@dataclass(frozen=True)
class SystemTime:
    """The time of day of the programs that have its environment."""

    file: Path

    def set(self, hours: float) -> None:
        """Sets the time to a number of hours from the machine's own time."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{hours * 3600:+.0f}\n")
        new.rename(self.file)

    @property
    def environment(self) -> Mapping[str, str]:
        """See faketime(1)."""
        return {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }


def system_time(folder: Path) -> SystemTime:
    """Yields a clock that begins with the machine's own time."""
    made = SystemTime(folder / "faketime")
    made.set(0)
    return made
