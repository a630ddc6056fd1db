"""Cache of uncompressed layers by diff_id, with the match indexes that workers write next to
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from twisted.logger import Logger

from obdelta.concurrency.threads import Threads
from obdelta.oci import DiffID
from obdelta.store import files
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin

log = Logger()


@dataclass(frozen=True, slots=True)
class PinnedLayer:
    """A layer in use: the file stays in place until it is released. Releasing twice is harmless."""

    diff_id: DiffID
    path: Path
    size: int
    pin: Pin

    def release(self) -> None:
        self.pin.release()

    def __enter__(self) -> PinnedLayer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class LayerCache(Cache):
    """``<state-dir>/layers/<hex>.tar``, with ``<hex>.idx`` beside it, which is counted too.

    Only for layers that were hashed as they were inflated. The catalogue records which blob
    inflates to which diff_id.

    Nothing is synced: syncing a layer takes longer than making it. Layers adopted before a system
    crash are hashed again before use, since a delta made from a torn layer would fail on every
    device.
    """

    suffix = ".tar"
    companion_suffixes = (".idx",)
    durable = False

    @classmethod
    async def open(
        cls, state_dir: Path, threads: Threads, limit: int, clock: Callable[[], float] = time.time
    ) -> LayerCache:
        """Opens the cache with the files of earlier runs. ``limit`` in bytes; ``clock`` gives
        seconds since the epoch.
        """
        cache = cls(state_dir / "layers", state_dir / "tmp", threads, limit, clock)
        await cache.scan()
        return cache

    async def pin(self, diff_id: DiffID) -> PinnedLayer | None:
        """Returns the layer, pinned until it is released, or None if it is missing."""
        pin = self._use(diff_id.hex)
        if pin is None:
            return None
        path = self._path(diff_id.hex)
        layer = PinnedLayer(diff_id, path, path.stat().st_size, pin)
        if files.is_sound(path):
            return layer
        try:
            sound = await self._threads.run(_is_intact, path, diff_id)
        except BaseException:
            layer.release()
            raise
        if sound:
            return layer
        log.warn(
            "layer {diff_id} was not whole after a restart; it is fetched again",
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
            files.mark_sound(path)

        await self._adopt(tmp, diff_id.hex, prepare)

    async def remove(self, diff_id: DiffID) -> None:
        """Removes a layer whose bytes proved wrong, even while it is in use."""
        if diff_id.hex in self._entries:
            await self._remove(self._take_out(diff_id.hex))


def _is_intact(path: Path, diff_id: DiffID) -> bool:
    """Hashes a layer, and marks it as sound if its digest matches its name."""
    if files.digest_of(path).hex != diff_id.hex:
        return False
    files.mark_sound(path)
    return True
