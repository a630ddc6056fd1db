"""The lock on a ``state-dir``: one server at a time, since a start empties ``tmp``. An advisory
lock on a file in it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO, Self

from obdelta.errors import StateInUse

NAME = "lock"


class StateLock:
    """The lock, held until :meth:`release` or the end of the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def take(cls, state_dir: Path) -> Self:
        """Takes the lock. Raises StateInUse if another process holds it."""
        # Read access is enough for a lock. A process that may not write the file (another user
        # created it) can still take part.
        file = open(  # noqa: PTH123, SIM115
            os.open(
                state_dir / NAME, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            ),
            "rb",
        )
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StateInUse("by a server, or by a command such as `obdelta gc`") from error
        except BaseException:
            file.close()
            raise
        return cls(file)

    def close(self) -> None:
        """Releases the lock."""
        self._file.close()

    async def release(self) -> None:
        """Releases the lock, awaitable like other shutdown steps."""
        self.close()
