"""Caches by digest, which builds and devices share: the upstream's blobs, inflated layers, and root
filesystems.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from twisted.logger import Logger

from obdelta.concurrency.tasks import Threads
from obdelta.oci import ChainID, DiffID, Digest
from obdelta.store import files, ownership
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin, Pinned

log = Logger()


@dataclass(frozen=True, slots=True)
class PinnedBlob(Pinned):
    """A blob in use: the file stays in place until it is released."""

    digest: Digest
    path: Path
    size: int
    pin: Pin


class UpstreamBlobCache(Cache[Digest]):
    """The upstream's blobs, compressed as they were fetched: ``<state-dir>/upstream/<hex>.blob``.

    It holds verified bytes only. Access rights are not checked here.

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


@dataclass(frozen=True, slots=True)
class PinnedLayer(Pinned):
    """A layer in use: the file stays in place until it is released."""

    diff_id: DiffID
    path: Path
    size: int
    pin: Pin


class LayerCache(Cache[DiffID]):
    """Uncompressed layers by diff_id: ``<state-dir>/layers/<hex>.tar``. The match index that worker
    processes write beside a layer, ``<hex>.idx``, is counted too.

    Only for layers that were hashed as they were inflated. The catalogue records which blob
    inflates to which diff_id.

    Nothing is synced: syncing a layer takes longer than making it. Layers adopted before a system
    crash are hashed again before use, since a delta made from a torn layer would fail on every
    device.
    """

    folder = "layers"
    suffix = ".tar"
    companion_suffixes = (".idx",)
    durable = False

    async def pin(self, diff_id: DiffID) -> PinnedLayer | None:
        """Returns the layer, pinned until it is released, or None if it is missing."""
        pin = self._use(diff_id.hex)
        if pin is None:
            return None
        path = self._path(diff_id.hex)
        layer = PinnedLayer(diff_id, path, path.stat().st_size, pin)
        if files.is_marked_intact(path):
            return layer
        try:
            intact = await self._threads.run(_is_intact, path, diff_id)
        except BaseException:
            layer.release()
            raise
        if intact:
            return layer
        log.warn(
            "layer {diff_id} is damaged since a restart of the system: it is fetched again",
            diff_id=str(diff_id),
        )
        layer.release()
        await self.remove(diff_id)
        return None

    async def adopt(self, tmp: Path, diff_id: DiffID, size: int) -> None:
        """Adds a tar that the caller has hashed; ``tmp`` no longer exists afterwards. Pin it within
        a minute.

        Raises SizeMismatch, and StoreFull if evicting other entries does not help.
        """

        def prepare(path: Path) -> None:
            files.check_size(path, size, f"layer {diff_id}")
            files.mark_intact(path)

        await self._adopt(tmp, diff_id.hex, prepare)


def _is_intact(path: Path, diff_id: DiffID) -> bool:
    """Hashes a layer, and marks it as sound if its digest matches its name."""
    if files.digest_of(path).hex != diff_id.hex:
        return False
    files.mark_intact(path)
    return True


@dataclass(frozen=True, slots=True)
class PinnedTree(Pinned):
    """A tree in use. ``path`` is its root directory, which is never changed, and stays until it is
    released.
    """

    chain_id: ChainID
    path: Path
    pin: Pin


class TreeCache(Cache[ChainID]):
    """Root filesystems by chain ID, unpacked once and shared by every pair that has the image:
    ``<state-dir>/trees/<hex>/root``.

    The time of last use is the mtime of ``<hex>``: the root's own mtime belongs to the image. The
    builder of a tree may keep more files beside ``root``.
    """

    folder = "trees"

    async def pin(self, chain_id: ChainID) -> PinnedTree | None:
        """Returns the tree, pinned until it is released, or None if it is missing."""
        pin = self._use(chain_id.hex)
        return None if pin is None else PinnedTree(chain_id, self._path(chain_id.hex) / "root", pin)

    async def adopt(self, tmp: Path, chain_id: ChainID) -> None:
        """Adds a directory that holds ``root``; ``tmp`` no longer exists afterwards. Pin it within
        a minute.
        """
        # A tree has far too many files to sync one by one, and a half-written one must not outlive
        # a power cut.
        await self._adopt(tmp, chain_id.hex, lambda _: os.sync())
