"""Uncompressed layers of upstream images: downloads and inflates each once for all builds.

A cached layer is handed out only for a blob that is *known* to inflate to it: the catalogue records
the pair when it was inflated and hashed here. An image config that merely claims another image's
diff_id gets nothing out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from twisted.internet.defer import DeferredSemaphore

from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.builds.inputs.image_lookup import ImageLayer
from obdelta.builds.inputs.work_limits import inflate_limit, work_seconds
from obdelta.concurrency.tasks import SingleFlight, Task, first_failure, settle
from obdelta.errors import Denied, DigestMismatch, LayerInvalid, Missing, Unauthorized
from obdelta.observability import Metrics
from obdelta.oci import DiffID, Digest
from obdelta.processes.worker_main import Json
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import LayerCache, PinnedBlob, PinnedLayer
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import LayerRow


class _DamagedBlob(LayerInvalid):
    """The blob was intact when it was fetched, and is damaged now."""


class LayerImporter:
    """Brings layers into the cache; concurrent requests for the same blob share one download."""

    def __init__(
        self,
        *,
        upstream: UpstreamBlobs,
        blobs: BlobStore,
        cache: LayerCache,
        catalogue: Catalogue,
        pool: WorkerPool,
        max_layer: int,
        max_image: int,
        job_seconds: float,
        downloads: int = 4,
        streams: int = 1,
        metrics: Metrics | None = None,
    ) -> None:
        """``downloads``: maximum parallel downloads. ``streams``: how many may be inflated while
        downloading.

        Each stream occupies a worker process.
        """
        self._metrics = metrics or Metrics()
        self._upstream, self._blobs, self._cache = upstream, blobs, cache
        self._catalogue, self._pool = catalogue, pool
        self._max_layer, self._max_image, self._job_seconds = max_layer, max_image, job_seconds
        self._slots = DeferredSemaphore(downloads)
        self._streams = streams
        self._importing: SingleFlight[tuple[Digest, DiffID], None] = SingleFlight(
            (Unauthorized, Denied, Missing)
        )

    async def ensure(
        self,
        wanted: ImageLayer,
        credentials: Credentials,
        report: Callable[[int], None] | None = None,
    ) -> PinnedLayer:
        """Returns the layer, pinned (the caller releases it).

        Cancelling ends an import only if no other client waits for it. Raises what
        :meth:`Upstream.blob` raises, LayerInvalid, DigestMismatch, StoreFull, WorkerFailed.
        """
        key = (wanted.descriptor.digest, wanted.diff_id)
        pinned = await self._cached(wanted, credentials)
        self._metrics.cache_looked_up("layers", pinned is not None)
        while True:
            pinned = pinned or await self._cached(wanted, credentials)
            if pinned is not None:
                return pinned
            await self._importing.do(key, lambda: self._import(wanted, credentials, report))
            # Another round: in rare cases the imported layer is evicted before it is pinned.

    async def ensure_all(
        self, layers: Iterable[ImageLayer], credentials: Credentials, *, images: int = 1
    ) -> list[PinnedLayer]:
        """Returns all layers of ``images`` images, each once, in no order; the caller releases
        them.

        Raises as :meth:`ensure` does, and LayerInvalid if they are too many bytes together.
        There may be hundreds of them, and a build's own layers cannot be evicted to make room.
        """
        wanted = list(dict.fromkeys(layers))
        most = self.max_bytes(wanted, images=images)
        together = 0

        async def one(layer: ImageLayer) -> PinnedLayer:
            nonlocal together
            pinned = await self.ensure(layer, credentials)
            together += pinned.size
            if together > most:
                pinned.release()
                raise LayerInvalid(
                    layer.descriptor.digest,
                    f"it and others inflate to more than {most} bytes together",
                )
            return pinned

        results = await settle(one(layer) for layer in wanted)
        pinned = [result for result in results if isinstance(result, PinnedLayer)]
        failure = first_failure(results)
        if failure is not None:
            for pin in pinned:
                pin.release()
            failure.raiseException()
        return pinned

    def max_bytes(self, layers: Iterable[ImageLayer], *, images: int = 1) -> int:
        """Returns how many bytes these layers may inflate to together. The same limit applies to
        the sizes of their files, holes included.
        """
        return inflate_limit(
            sum(layer.descriptor.size for layer in layers), images * self._max_image
        )

    async def inflated_size(self, layers: Iterable[ImageLayer]) -> int:
        """Returns the sum of the layers' inflated sizes; all of them were inflated before."""
        rows = [await self._catalogue.layer(layer.descriptor.digest) for layer in layers]
        return sum(row.size for row in rows if row is not None)

    async def admit(self, layers: Iterable[ImageLayer], credentials: Credentials) -> None:
        """Raises unless the upstream has each layer in its repository: a cached layer grants no
        access.
        """
        results = await settle(
            self._upstream.admit(layer.repository, layer.descriptor.digest, credentials)
            for layer in layers
        )
        failure = first_failure(results)
        if failure is not None:
            failure.raiseException()

    async def are_known(self, layers: Iterable[ImageLayer]) -> bool:
        """Returns whether each of these blobs was inflated here before, and gave the diff_id of the
        image's config.
        """
        for wanted in layers:
            known = await self._catalogue.layer(wanted.descriptor.digest)
            if known is None or known.diff_id != wanted.diff_id:
                return False
        return True

    async def sizes(
        self, layers: Iterable[ImageLayer], credentials: Credentials
    ) -> list[tuple[DiffID, int]]:
        """Returns diff_id and uncompressed size of each layer. Only layers that were never inflated
        here are fetched.

        Raises as :meth:`ensure_all` does.
        """
        wanted = list(layers)
        known: dict[ImageLayer, int] = {}
        for layer in dict.fromkeys(wanted):
            row = await self._catalogue.layer(layer.descriptor.digest)
            if row is not None and row.diff_id == layer.diff_id:
                known[layer] = row.size
        await self.admit(known, credentials)
        pinned = await self.ensure_all(
            (layer for layer in wanted if layer not in known), credentials
        )
        fetched = {pin.diff_id: pin.size for pin in pinned}
        for pin in pinned:
            pin.release()
        return [
            (layer.diff_id, known[layer] if layer in known else fetched[layer.diff_id])
            for layer in wanted
        ]

    async def drop(self, diff_ids: Iterable[DiffID]) -> None:
        """Removes suspect layers (a proof failed with them): their next use begins with a new
        download.
        """
        for diff_id in diff_ids:
            await self._cache.remove(diff_id)

    async def _cached(self, wanted: ImageLayer, credentials: Credentials) -> PinnedLayer | None:
        known = await self._catalogue.layer(wanted.descriptor.digest)
        if known is None:
            return None
        # This comes first: other clients must not learn even what is wrong with it.
        await self.admit([wanted], credentials)
        if known.diff_id != wanted.diff_id:
            raise LayerInvalid(
                wanted.descriptor.digest, f"it inflates to {known.diff_id}, not to {wanted.diff_id}"
            )
        return await self._cache.pin(wanted.diff_id)

    async def _import(
        self, wanted: ImageLayer, credentials: Credentials, report: Callable[[int], None] | None
    ) -> None:
        descriptor = wanted.descriptor
        inflated = self._blobs.temporary(".tar")
        await self._slots.acquire()
        try:
            job: Json = {
                "task": "import",
                "out": str(inflated),
                "limit": inflate_limit(descriptor.size, self._max_layer),
                "diff_id": str(wanted.diff_id),
            }
            try:
                result = await self._inflated(wanted, credentials, job, report)
            except _DamagedBlob:
                result = await self._inflated(wanted, credentials, job, report)
            await self._cache.adopt(inflated, wanted.diff_id, int(result["size"]))
            await self._catalogue.record_layer(
                LayerRow(
                    descriptor.digest,
                    int(result["blob_size"]),
                    wanted.diff_id,
                    int(result["size"]),
                    descriptor.media_type,
                )
            )
        finally:
            self._slots.release()
            inflated.unlink(missing_ok=True)

    async def _inflated(
        self,
        wanted: ImageLayer,
        credentials: Credentials,
        job: Json,
        report: Callable[[int], None] | None,
    ) -> Json:
        """Returns the job's result. Raises _DamagedBlob if our disk was at fault: the next call
        fetches the blob again.
        """
        if not self._streams:
            with await self._upstream.fetched(
                wanted.repository, wanted.descriptor, credentials
            ) as compressed:
                return await self._run_kept(job, compressed, report)
        self._streams -= 1
        try:
            return await self._inflated_meanwhile(wanted, credentials, job, report)
        finally:
            self._streams += 1

    async def _inflated_meanwhile(
        self,
        wanted: ImageLayer,
        credentials: Credentials,
        job: Json,
        report: Callable[[int], None] | None,
    ) -> Json:
        """Returns the job's result; the worker process begins while the blob is being fetched."""
        descriptor = wanted.descriptor
        inflating: Task[Json] | None = None
        fetches = 0
        # A name of our own for the file that is being written: the file will be moved.
        link = self._blobs.temporary(".blob")

        def begun(file: Path) -> None:
            nonlocal inflating, fetches
            fetches += 1
            if fetches == 1:
                # The file was moved already, or cannot get another name (no inode, say). It is then
                # inflated once it is whole.
                with suppress(OSError):
                    link.hardlink_to(file)
                    growing = {**job, "source": str(link), "coming": descriptor.size}
                    # The download takes its time, too: only build-timeout ends it.
                    inflating = Task(self._run(growing, report, self._job_seconds))

        try:
            with await self._upstream.fetched(
                wanted.repository, descriptor, credentials, begun
            ) as compressed:
                # Only now: a worker's report about bytes that are not the blob's must be ignored.
                if inflating is not None and fetches == 1 and compressed.size == descriptor.size:
                    return await inflating.result()
                if inflating is not None:
                    # It reads a fetch that failed, or waits for as many bytes as a wrong manifest
                    # declares.
                    await inflating.end()
                return await self._run_kept(job, compressed, report)
        finally:
            link.unlink(missing_ok=True)
            if inflating is not None:
                await inflating.end()

    async def _run(self, job: Json, report: Callable[[int], None] | None, seconds: float) -> Json:
        return await self._pool.run(
            job,
            seconds=seconds,
            progress=None if report is None else lambda step: report(int(step["bytes"])),
        )

    async def _run_kept(
        self, job: Json, kept: PinnedBlob, report: Callable[[int], None] | None
    ) -> Json:
        try:
            seconds = work_seconds(job["limit"], self._job_seconds)
            return await self._run({**job, "source": str(kept.path)}, report, seconds)
        except (DigestMismatch, LayerInvalid) as error:
            if await self._upstream.drop_damaged(kept):
                raise _DamagedBlob(kept.digest, f"it was damaged on the disk: {error}") from error
            raise
