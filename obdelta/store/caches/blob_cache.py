"""Cache of the upstream's blobs by digest, compressed as they were fetched. Devices and builds
share it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from obdelta.concurrency.threads import Threads
from obdelta.oci import Digest
from obdelta.store import files, ownership
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin


@dataclass(frozen=True, slots=True)
class PinnedBlob:
    """A blob in use: the file stays in place until it is released. Releasing twice is harmless."""

    digest: Digest
    path: Path
    size: int
    pin: Pin

    def release(self) -> None:
        self.pin.release()

    def __enter__(self) -> PinnedBlob:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class UpstreamBlobCache(Cache):
    """``<state-dir>/upstream/<hex>.blob``, for verified bytes only. Access rights are not checked
    here.

    A blob is not synced when it is placed: builds wait for it, and syncing takes longer than
    fetching. After a system crash :mod:`obdelta.store.crash_recovery` verifies what is left before
    anything uses it. An orderly shutdown begins with :meth:`sync`.
    """

    suffix = ".blob"

    def __init__(
        self,
        root: Path,
        trash: Path,
        threads: Threads,
        limit: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(root, trash, threads, limit, clock)
        self._unsynced: set[Path] = set()

    @classmethod
    async def open(
        cls, state_dir: Path, threads: Threads, limit: int, clock: Callable[[], float] = time.time
    ) -> UpstreamBlobCache:
        """Opens the cache with the files of earlier runs. ``limit`` in bytes; ``clock`` gives
        seconds since the epoch.
        """
        cache = cls(state_dir / "upstream", state_dir / "tmp", threads, limit, clock)
        await cache.scan()
        return cache

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
        with files.full_is_clear():
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

    async def remove(self, digest: Digest) -> None:
        """Removes a blob whose bytes proved wrong, even while it is in use."""
        if digest.hex in self._entries:
            await self._remove(self._take_out(digest.hex))


def _synced(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # evicted
            files.sync_file(path)
    files.sync_directory(folder)
