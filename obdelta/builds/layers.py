"""Layers of the upstream as uncompressed tars on our disk: fetched once, inflated once, however many builds need them.

A cached layer is handed out only for a blob that is *known* to inflate to it (the catalogue records the pair when it was
inflated and hashed here): an image config that merely claims somebody else's diff_id gets nothing out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from twisted.internet.defer import DeferredSemaphore

from obdelta.builds.concurrent import Shared
from obdelta.builds.images import ResolvedImage
from obdelta.builds.pool import WorkerPool
from obdelta.builds.upstream_blobs import UpstreamBlobs
from obdelta.errors import Denied, LayerInvalid, Missing, Unauthorized
from obdelta.metrics import Metrics
from obdelta.oci import Descriptor, DiffID, Digest, ImageConfig
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import LayerCache, PinnedLayer
from obdelta.store.rows import LayerRow

INFLATE_FLOOR = 64 * 1024 * 1024
INFLATE_RATIO = 256
"""A layer may inflate to INFLATE_FLOOR bytes plus INFLATE_RATIO times its declared (compressed) size. Real layers stay under
a ratio of 20; deflate's own limit is 1032."""


def inflate_limit(compressed: int, most: int) -> int:
    """How many bytes a blob of ``compressed`` bytes may inflate to; ``most`` is the setting ``max-layer``."""
    return min(most, INFLATE_FLOOR + INFLATE_RATIO * compressed)


@dataclass(frozen=True, slots=True)
class WantedLayer:
    """A layer of an image: the blob that the manifest names and the diff_id that the config promises."""

    repository: str
    descriptor: Descriptor
    diff_id: DiffID


def wanted_layers(image: ResolvedImage, config: ImageConfig) -> list[WantedLayer]:
    """All layers of an image, bottom to top."""
    pairs = zip(image.manifest.layers, config.diff_ids, strict=True)
    return [WantedLayer(image.repository, descriptor, diff_id) for descriptor, diff_id in pairs]


class LayerImporter:
    """Brings layers into the cache; concurrent wishes for the same blob share one download."""

    def __init__(
        self,
        *,
        upstream: UpstreamBlobs,
        blobs: BlobStore,
        cache: LayerCache,
        catalogue: Catalogue,
        pool: WorkerPool,
        max_layer: int,
        job_seconds: float,
        downloads: int = 4,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._upstream, self._blobs, self._cache = upstream, blobs, cache
        self._catalogue, self._pool = catalogue, pool
        self._max_layer, self._job_seconds = max_layer, job_seconds
        self._slots = DeferredSemaphore(downloads)
        self._importing: Shared[tuple[Digest, DiffID], None] = Shared((Unauthorized, Denied, Missing))

    async def ensure(
        self, wanted: WantedLayer, credentials: Credentials, report: Callable[[int], None] | None = None
    ) -> PinnedLayer:
        """The layer, pinned (the caller releases it). Cancelling leaves an import that others wait for alone, and calls off
        one that nobody else waits for.

        Raises what :meth:`Upstream.blob` raises, LayerInvalid, DigestMismatch, StoreFull, WorkerFailed.
        """
        key = (wanted.descriptor.digest, wanted.diff_id)
        pinned = await self._cached(wanted)
        self._metrics.cache_asked("layers", pinned is not None)
        while True:
            pinned = pinned or await self._cached(wanted)
            if pinned is not None:
                return pinned
            await self._importing.do(key, lambda: self._import(wanted, credentials, report))
            # Once more round: what was imported may be evicted before it is pinned, if rarely.

    async def are_known(self, layers: Iterable[WantedLayer]) -> bool:
        """Whether each of these blobs was inflated here before, and gave what the image's config says."""
        for wanted in layers:
            known = await self._catalogue.layer(wanted.descriptor.digest)
            if known is None or known.diff_id != wanted.diff_id:
                return False
        return True

    async def drop(self, diff_ids: Iterable[DiffID]) -> None:
        """These are suspect (a proof failed with them): their next use begins with a new download."""
        for diff_id in diff_ids:
            await self._cache.remove(diff_id)

    async def _cached(self, wanted: WantedLayer) -> PinnedLayer | None:
        known = await self._catalogue.layer(wanted.descriptor.digest)
        if known is None:
            return None
        if known.diff_id != wanted.diff_id:
            raise LayerInvalid(wanted.descriptor.digest, f"it inflates to {known.diff_id}, not to {wanted.diff_id}")
        return await self._cache.pin(wanted.diff_id)

    async def _import(
        self, wanted: WantedLayer, credentials: Credentials, report: Callable[[int], None] | None
    ) -> None:
        descriptor = wanted.descriptor
        inflated = self._blobs.temporary(".tar")
        await self._slots.acquire()
        try:
            with await self._upstream.fetched(wanted.repository, descriptor, credentials) as compressed:
                result = await self._pool.run(
                    {
                        "task": "import",
                        "source": str(compressed.path),
                        "out": str(inflated),
                        "limit": inflate_limit(descriptor.size, self._max_layer),
                        "diff_id": str(wanted.diff_id),
                    },
                    seconds=self._job_seconds,
                    progress=None if report is None else lambda step: report(int(step["bytes"])),
                )
            await self._cache.adopt(inflated, wanted.diff_id, int(result["size"]))
            await self._catalogue.record_layer(
                LayerRow(descriptor.digest, descriptor.size, wanted.diff_id, int(result["size"]), descriptor.media_type)
            )
        finally:
            self._slots.release()
            inflated.unlink(missing_ok=True)
