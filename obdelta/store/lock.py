"""Who uses a ``state-dir``: servers share it, what works on it while none runs has it alone. An advisory lock on a file in it."""

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
    def shared(cls, state_dir: Path) -> Self:
        """As a server. Raises StateInUse while somebody has it alone."""
        return cls._taken(state_dir, fcntl.LOCK_SH, "a command has it to itself, such as `obdelta gc`")

    @classmethod
    def alone(cls, state_dir: Path) -> Self:
        """As what must not run beside a server. Raises StateInUse while anybody has it."""
        return cls._taken(state_dir, fcntl.LOCK_EX, "a server, or another command, uses it")

    @classmethod
    def _taken(cls, state_dir: Path, kind: int, why: str) -> Self:
        # Read is enough for a lock: who may not write the file (another user made it) can still take part.
        file = open(os.open(state_dir / NAME, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644), "rb")  # noqa: PTH123, SIM115
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StateInUse(why) from error
        except BaseException:
            file.close()
            raise
        return cls(file)

    async def release(self) -> None:
        """Lets others have it."""
        self._file.close()
