"""Blobs of the upstream by digest, as they were fetched: a cache that devices and builds share."""

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
    """A blob in use: it stays where it is until it is released (once is enough, twice is fine)."""

    digest: Digest
    path: Path
    size: int
    pin: Pin

    def release(self) -> None:
        """The use is over."""
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
    """``<state-dir>/upstream/<hex>.blob``. Only for bytes that were verified; who may have which is
    not known here.

    A blob is not synced when it is placed: builds wait for it, and that takes longer than fetching
    it. What a crash of the system leaves of it is verified before anything uses it
    (:mod:`obdelta.store.crash_recovery`), and an orderly end begins with :meth:`sync`.
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
        """Finds what earlier runs left. ``limit`` in bytes; ``clock`` gives seconds since the
        epoch.
        """
        cache = cls(state_dir / "upstream", state_dir / "tmp", threads, limit, clock)
        await cache.scan()
        return cache

    def pin(self, digest: Digest) -> PinnedBlob | None:
        """The blob, kept until it is released; None when it is not there. Two calls of the file
        system: fit for the reactor.
        """
        pin = self._use(digest.hex)
        if pin is None:
            return None
        path = self._path(digest.hex)
        return PinnedBlob(digest, path, path.stat().st_size, pin)

    def place(self, tmp: Path, digest: Digest, size: int) -> Path:
        """Moves verified bytes to their name. Blocking; then call :meth:`keep`, in the reactor
        thread.

        A kill in between is fine: a start finds the file. Raises SizeMismatch, StoreFull.
        """
        files.check_size(tmp, size, f"blob {digest}")
        path = self._path(digest.hex)
        with files.full_is_clear():
            ownership.make_folder(path.parent)
            tmp.rename(path)
        return path

    def keep(self, digest: Digest, size: int) -> None:
        """What was placed belongs to the cache from now on."""
        self._unsynced.add(self._path(digest.hex))
        self._enter(digest.hex, files.whole_blocks(size))

    async def sync(self) -> None:
        """Makes durable what was kept since the last time: the system has written most of it by
        itself.
        """
        unsynced, self._unsynced = self._unsynced, set()
        if unsynced:
            await self._threads.run(_synced, unsynced, self.root)

    async def remove(self, digest: Digest) -> None:
        """Removes a blob that turned out wrong, also while it is in use."""
        if digest.hex in self._entries:
            await self._remove(self._take_away(digest.hex))


def _synced(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # evicted
            files.sync_file(path)
    files.sync_directory(folder)
