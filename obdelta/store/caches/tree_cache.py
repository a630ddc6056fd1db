"""Cache of root filesystems by chain ID: unpacked once, shared by every pair that has the image."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from obdelta.concurrency.threads import Threads
from obdelta.oci import ChainID
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin


@dataclass(frozen=True, slots=True)
class PinnedTree:
    """A tree in use. ``path`` is its root directory, which is never changed, and stays until it is
    released.
    """

    chain_id: ChainID
    path: Path
    pin: Pin

    def release(self) -> None:
        """Ends the use. Releasing twice is harmless."""
        self.pin.release()

    def __enter__(self) -> PinnedTree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class TreeCache(Cache):
    """``<state-dir>/trees/<hex>/root``.

    The time of last use is the mtime of ``<hex>``: the root's own mtime belongs to the image. The
    builder of a tree may keep more files beside ``root``.
    """

    @classmethod
    async def open(
        cls, state_dir: Path, threads: Threads, limit: int, clock: Callable[[], float] = time.time
    ) -> TreeCache:
        """Opens the cache with the trees of earlier runs. ``limit`` in bytes; ``clock`` gives
        seconds since the epoch.
        """
        cache = cls(state_dir / "trees", state_dir / "tmp", threads, limit, clock)
        await cache.scan()
        return cache

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

    async def remove(self, chain_id: ChainID) -> None:
        """Removes a tree whose contents proved wrong, even while it is in use."""
        if chain_id.hex in self._entries:
            await self._remove(self._take_out(chain_id.hex))
