"""Files that are read again when they change: certificates, keys of tokens, and passwords."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY = 1.0
"""Seconds between two looks at the files: a look is cheap enough for every request."""


@dataclass(frozen=True, slots=True)
class FileProblem:
    """Why a file that has changed is not used. ``since``: by the clock that watches it, when that
    was found. ``setting`` names the file.
    """

    path: Path
    why: str
    since: float
    setting: str = "tls-certificate"


class WatchedFiles:
    """Files that belong together. ``now`` returns seconds."""

    def __init__(self, paths: Sequence[Path], now: Callable[[], float]) -> None:
        self._paths, self._now = paths, now
        self.mark()

    def mark(self) -> None:
        """Counts the files as known from now on. Call it before they are read, so that a change
        meanwhile is not lost.
        """
        self._looked = self._now()
        self._known = [_identity(path) for path in self._paths]

    def changed(self) -> bool:
        """Returns whether a file has changed since the last look. Looks at most once a second."""
        if abs(self._now() - self._looked) < LOOK_EVERY:
            return False
        known = self._known
        self.mark()
        return self._known != known


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of the last change of its attributes: another mode or owner can end or repair access.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
