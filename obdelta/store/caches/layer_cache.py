"""Cache of uncompressed layers by diff_id, with the match indexes that worker processes write
beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twisted.logger import Logger

from obdelta.oci import DiffID
from obdelta.store import files
from obdelta.store.caches.cache import Cache
from obdelta.store.pins import Pin, Pinned

log = Logger()


@dataclass(frozen=True, slots=True)
class PinnedLayer(Pinned):
    """A layer in use: the file stays in place until it is released."""

    diff_id: DiffID
    path: Path
    size: int
    pin: Pin


class LayerCache(Cache[DiffID]):
    """``<state-dir>/layers/<hex>.tar``, with ``<hex>.idx`` beside it, which is counted too.

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
