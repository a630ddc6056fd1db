"""Root filesystems of images as plain trees, unpacked once per image by a worker process."""

from __future__ import annotations

import time
from collections.abc import Callable

from obdelta.builds.inputs.image_lookup import ImageLayer
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.inputs.work_limits import work_seconds
from obdelta.concurrency.tasks import SingleFlight
from obdelta.errors import Denied, Missing, Unauthorized, WorkTooLong
from obdelta.observability import Metrics
from obdelta.oci import ChainID, Digest, chain_ids
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import PinnedLayer, PinnedTree, TreeCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.failure_records import work_key

_NOTHING = ChainID.of(b"")
"""The chain ID for the tree of an image without layers."""


class TreeMaker:
    """Brings root filesystems into the cache; concurrent requests for the same image share the
    work.
    """

    def __init__(
        self,
        *,
        importer: LayerImporter,
        cache: TreeCache,
        blobs: BlobStore,
        pool: WorkerPool,
        job_seconds: float,
        catalogue: Catalogue,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``now``: seconds UTC."""
        self._catalogue, self._now = catalogue, now
        self._metrics = metrics or Metrics()
        self._importer, self._cache, self._blobs, self._pool = importer, cache, blobs, pool
        self._job_seconds = job_seconds
        self._making: SingleFlight[tuple[ChainID, tuple[Digest, ...]], None] = SingleFlight(
            (Unauthorized, Denied, Missing)
        )

    async def ensure(self, layers: list[ImageLayer], credentials: Credentials) -> PinnedTree:
        """Returns the tree of these layers, bottom to top, pinned (the caller releases it).

        Raises what :meth:`LayerImporter.ensure` raises, LayerInvalid for a tar that leaves its
        tree, StoreFull, WorkerFailed.
        """
        chain = chain_ids(layer.diff_id for layer in layers)
        chain_id = chain[-1] if chain else _NOTHING
        pinned = await self._cached(layers, chain_id, credentials)
        self._metrics.cache_looked_up("trees", pinned is not None)
        while True:
            pinned = pinned or await self._cached(layers, chain_id, credentials)
            if pinned is not None:
                return pinned
            # The key holds the blobs too: a false claim of the same chain ID must not fail another
            # client's tree.
            key = (chain_id, tuple(layer.descriptor.digest for layer in layers))
            await self._making.do(key, lambda: self._make(layers, chain_id, credentials))

    async def _cached(
        self, layers: list[ImageLayer], chain_id: ChainID, credentials: Credentials
    ) -> PinnedTree | None:
        # An image config may claim any diff_ids, and a manifest any blobs. Only layers that were
        # inflated from this image's own blobs, in its own repository, lead to a cached tree.
        if not await self._importer.are_known(layers):
            return None
        await self._importer.admit(layers, credentials)
        return await self._cache.pin(chain_id)

    async def inflated_size(self, layers: list[ImageLayer]) -> int:
        """Returns the inflated bytes of a tree's layers."""
        return await self._importer.inflated_size(layers)

    async def drop(self, layers: list[ImageLayer]) -> None:
        """Removes a suspect tree (a proof failed with it) and its layers."""
        chain = chain_ids(layer.diff_id for layer in layers)
        await self._cache.remove(chain[-1] if chain else _NOTHING)
        await self._importer.drop(layer.diff_id for layer in layers)

    async def _make(
        self, layers: list[ImageLayer], chain_id: ChainID, credentials: Credentials
    ) -> None:
        work = work_key("tree", [layer.descriptor.digest for layer in layers])
        if (slow := await self._catalogue.slow_work.reason(work, int(self._now()))) is not None:
            raise WorkTooLong(slow)
        pinned: list[PinnedLayer] = []
        place = self._blobs.temporary(".tree")
        try:
            pinned = await self._importer.ensure_all(layers, credentials)
            paths = {pin.diff_id: pin.path for pin in pinned}
            sizes = {pin.diff_id: pin.size for pin in pinned}
            await self._pool.run(
                {
                    "task": "unpack",
                    "layers": [
                        {"diff_id": str(layer.diff_id), "path": str(paths[layer.diff_id])}
                        for layer in layers
                    ],
                    "out": str(place),
                    "limit": self._importer.max_bytes(layers),
                },
                seconds=work_seconds(
                    sum(sizes[layer.diff_id] for layer in layers), self._job_seconds
                ),
            )
            await self._cache.adopt(place, chain_id)
        except WorkTooLong as error:
            await self._catalogue.slow_work.remember(work, error.why, int(self._now()))
            raise
        finally:
            for pin in pinned:
                pin.release()
            await self._blobs.threads.run(files.remove, place)
