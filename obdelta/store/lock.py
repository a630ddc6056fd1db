"""The lock on a ``state-dir``: one server at a time, since a start empties ``tmp``.

There are two advisory locks: on the directory itself, and on the file ``lock`` in it. The file can
be removed while it is locked; then the lock on the directory still keeps a second server away.
Older versions know only the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import BinaryIO, Self

from obdelta.errors import StateInUse

NAME = "lock"


class StateLock:
    """The lock, held until :meth:`release` or the end of the process."""

    def __init__(self, path: Path, file: BinaryIO, folder: int) -> None:
        self._path, self._file, self._folder = path, file, folder

    @classmethod
    def take(cls, state_dir: Path) -> Self:
        """Takes the lock. Raises StateInUse if another process holds it."""
        # Read access is enough for a lock. A process that may not write the file (another user
        # created it) can still take part.
        path = state_dir / NAME
        with contextlib.ExitStack() as opened:
            folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            descriptor = os.open(
                path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            file = opened.enter_context(os.fdopen(descriptor, "rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock_folder(folder)
            except BlockingIOError as error:
                raise StateInUse(
                    "by a server, or by a command such as `obdelta gc`: stop it, or set another"
                    " state-dir"
                ) from error
            opened.pop_all()
        return cls(path, file, folder)

    def problem(self) -> str | None:
        """Returns why the file no longer keeps others away, or None. Costs one ``stat``."""
        held = os.fstat(self._file.fileno())
        try:
            found = self._path.stat(follow_symlinks=False)
        except OSError:
            found = None
        if found is not None and (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino):
            return None
        return (
            f"{NAME} was removed from state-dir, or replaced: another obdelta might use the same"
            " directory: restart obdelta"
        )

    def close(self) -> None:
        """Releases the lock. Closing twice is fine."""
        self._file.close()
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    async def release(self) -> None:
        """Releases the lock, awaitable like other shutdown steps."""
        self.close()


def _lock_folder(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # Some network file systems lock files only. The lock on the file is held then.
        return
