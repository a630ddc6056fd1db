"""Who uses a ``state-dir``: one at a time, as a start empties ``tmp``. An advisory lock on a file
in it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO, Self

from obdelta.errors import StateInUse

NAME = "lock"


class StateLock:
    """Held until :meth:`release`, or until the process ends, however it does."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def take(cls, state_dir: Path) -> Self:
        """Raises StateInUse while somebody has it."""
        # Read is enough for a lock: who may not write the file (another user made it) can still
        # take part.
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
        """Lets others have it."""
        self._file.close()

    async def release(self) -> None:
        """The same, as what else is closed in the end wants it."""
        self.close()
