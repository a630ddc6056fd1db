"""Cache of root filesystems by chain ID: unpacked once, shared by every pair that has the image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from obdelta.oci import ChainID
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin, Pinned


@dataclass(frozen=True, slots=True)
class PinnedTree(Pinned):
    """A tree in use. ``path`` is its root directory, which is never changed, and stays until it is
    released.
    """

    chain_id: ChainID
    path: Path
    pin: Pin


class TreeCache(Cache[ChainID]):
    """``<state-dir>/trees/<hex>/root``.

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
