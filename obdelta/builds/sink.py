"""A sink for a download that is a temporary file: written in a thread, a full disk told apart."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from obdelta.store import disk
from obdelta.store.threads import Threads


class FileSink:
    """Writes to a new file at ``path`` (StoreFull when none can be made). Who made it closes it, and removes the file."""

    def __init__(self, path: Path, threads: Threads) -> None:
        with disk.full_is_clear():
            self._file = path.open("xb", buffering=0)
        self._threads = threads
        self._lock = Lock()

    async def write(self, chunk: bytes) -> None:
        """Resolves when the chunk is written; raises StoreFull."""
        await self._threads.run(self._write, chunk)

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        with self._lock, disk.full_is_clear():
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Closes the file, in a thread: after a write that may be under way (of a download that was cancelled)."""
        self._threads.start(self._close)

    def _close(self) -> None:
        with self._lock:
            self._file.close()
