"""Cache of the upstream's blobs by digest, compressed as they were fetched. Devices and builds
share it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from obdelta.concurrency.threads import Threads
from obdelta.oci import Digest
from obdelta.store import files, ownership
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin, Pinned


@dataclass(frozen=True, slots=True)
class PinnedBlob(Pinned):
    """A blob in use: the file stays in place until it is released."""

    digest: Digest
    path: Path
    size: int
    pin: Pin


class UpstreamBlobCache(Cache[Digest]):
    """``<state-dir>/upstream/<hex>.blob``, for verified bytes only. Access rights are not checked
    here.

    A blob is not synced when it is placed: builds wait for it, and syncing takes longer than
    fetching. After a system crash :mod:`obdelta.store.crash_recovery` verifies what is left before
    anything uses it. An orderly shutdown begins with :meth:`sync`.
    """

    folder = "upstream"
    suffix = ".blob"

    def __init__(
        self, state_dir: Path, threads: Threads, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(state_dir, threads, clock)
        self._unsynced: set[Path] = set()

    def pin(self, digest: Digest) -> PinnedBlob | None:
        """Returns the blob, pinned until it is released, or None if it is missing. Two file system
        calls, cheap enough for the reactor thread.
        """
        pin = self._use(digest.hex)
        if pin is None:
            return None
        path = self._path(digest.hex)
        return PinnedBlob(digest, path, path.stat().st_size, pin)

    def place(self, tmp: Path, digest: Digest, size: int) -> Path:
        """Moves verified bytes to their name. Blocking; then call :meth:`keep` in the reactor
        thread.

        A kill in between is harmless: the next start finds the file. Raises SizeMismatch,
        StoreFull.
        """
        files.check_size(tmp, size, f"blob {digest}")
        path = self._path(digest.hex)
        with files.disk_full_as_error():
            ownership.make_folder(path.parent)
            tmp.rename(path)
        return path

    def keep(self, digest: Digest, size: int) -> None:
        """Records a placed blob as part of the cache."""
        self._unsynced.add(self._path(digest.hex))
        self._enter(digest.hex, files.whole_blocks(size))

    async def sync(self) -> None:
        """Makes durable all blobs kept since the last call. The system has written most of them by
        itself.
        """
        unsynced, self._unsynced = self._unsynced, set()
        if unsynced:
            await self._threads.run(_synced, unsynced, self.root)


def _synced(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # evicted
            files.sync_file(path)
    files.sync_directory(folder)
