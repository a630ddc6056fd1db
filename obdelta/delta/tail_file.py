"""A file that one thread writes while another reads it, as through a pipe."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self


class TailFile:
    """A new file. One thread calls :meth:`write` and then :meth:`end`, another :meth:`read`. A
    context manager, which closes the file: the reader must be done by then.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._changed = threading.Condition()
        self._size = self._position = 0
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, content: bytes | bytearray) -> None:
        """Appends all bytes."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        with self._changed:
            self._size += len(content)
            self._changed.notify()

    def end(self) -> None:
        """Declares the file complete."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def read(self, most: int, /) -> bytes:
        """Returns up to ``most`` of the next bytes; waits if there are none yet. Empty at the
        end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._position < self._size)
            ready = self._size - self._position
        chunk = os.pread(self._file.fileno(), min(most, ready), self._position)
        self._position += len(chunk)
        return chunk
