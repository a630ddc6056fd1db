"""The parts that all other parts of a server use: ``state-dir``, upstream registry, worker
processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from obdelta.app.access import make_policy, make_upstream
from obdelta.app.runtime import Runtime
from obdelta.builds.device_estimates import DeviceEstimates
from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.builds.inputs.delta_names import DeltaNames
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.publish.publish_image import DeltaImages
from obdelta.concurrency.cores import available_cores
from obdelta.concurrency.tasks import Threads
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.oci import Digest
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import CredentialPolicy, Upstream
from obdelta.rsync.batch import out_of_sync
from obdelta.settings import Settings
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import Cache
from obdelta.store.caches.digest_caches import LayerCache, TreeCache, UpstreamBlobCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.fleet_bytes import FLEETS
from obdelta.store.crash_recovery import RunMarker
from obdelta.store.lock import StateLock
from obdelta.store.ownership import CATALOGUE, claim
from obdelta.store.quota import Evictable, Quota, StoredDeltas
from obdelta.store.quota_service import QuotaService
from obdelta.web.operators.health import (
    WORKERS_CACHE_SECONDS,
    Readiness,
    upstream_problem,
    workers_problem,
)

WORKER_NICENESS = 10
MAX_READY = 4
"""Maximum number of idle worker processes that are kept ready, at 30 MB each: one for each core up
to this number.
"""
KEPT = frozenset({Digest.of(out_of_sync())})
"""Blobs that belong to no delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All stored state."""

    threads: Threads
    blobs: BlobStore
    catalogue: Catalogue
    layers: LayerCache
    trees: TreeCache
    upstream_blobs: UpstreamBlobCache
    quota_service: QuotaService


@dataclass(frozen=True, slots=True, kw_only=True)
class Components(Runtime):
    """The stored state, the upstream registry, and the worker processes. ``policy`` chooses
    credentials for the upstream; ``importer`` puts the upstream's inflated layers into the cache;
    ``images`` publishes finished v3 deltas, whichever builder made them.
    """

    state: State
    upstream: Upstream
    upstream_blobs: UpstreamBlobs
    pool: WorkerPool
    policy: CredentialPolicy
    estimates: DeviceEstimates
    readiness: Readiness
    lookup: ImageLookup
    tags: DeltaNames
    importer: LayerImporter
    images: DeltaImages


async def open_components(runtime: Runtime) -> Components:
    """Opens the state, the upstream and the pool of worker processes. Raises SettingsError, and
    what :func:`open_state` raises.
    """
    settings, reactor, services = runtime.settings, runtime.reactor, runtime.services
    state = await open_state(runtime)
    upstream = make_upstream(runtime)
    services.add_stop(upstream.close)
    blobs = UpstreamBlobs(
        upstream, state.upstream_blobs, state.threads, reactor, state.quota_service.make_room
    )
    services.add_stop(blobs.close)
    pool = make_pool(runtime)
    readiness = Readiness(reactor)
    lookup = ImageLookup(upstream, reactor, state.catalogue.named_images, time.time)
    readiness.add("upstream", upstream_problem(upstream))
    readiness.add("workers", workers_problem(pool), cache_seconds=WORKERS_CACHE_SECONDS)
    return Components(
        settings=settings,
        reactor=reactor,
        threads=runtime.threads,
        metrics=runtime.metrics,
        services=services,
        state=state,
        upstream=upstream,
        upstream_blobs=blobs,
        pool=pool,
        policy=make_policy(settings),
        estimates=DeviceEstimates(state.catalogue.device_downloads, runtime.threads, reactor),
        readiness=readiness,
        lookup=lookup,
        tags=DeltaNames(state.catalogue, lookup, upstream, time.time),
        importer=LayerImporter(
            upstream=blobs,
            blobs=state.blobs,
            cache=state.layers,
            catalogue=state.catalogue,
            pool=pool,
            max_layer=settings.max_image,
            max_image=settings.max_image,
            job_seconds=settings.build_timeout,
            metrics=runtime.metrics,
            streams=settings.max_builds,
        ),
        images=DeltaImages(
            clock=reactor,
            blobs=state.blobs,
            catalogue=state.catalogue,
            max_delta_ratio=settings.max_delta_ratio,
        ),
    )


def make_pool(runtime: Runtime) -> WorkerPool:
    """Returns the pool of worker processes that all builders share."""
    settings = runtime.settings
    pool = WorkerPool(
        runtime.reactor,
        settings.max_builds + 1,
        settings.worker_memory,
        WORKER_NICENESS,
        min(available_cores(), MAX_READY),
    )
    runtime.services.add_stop(pool.close)
    pool.warm_up()
    return pool


async def open_state(runtime: Runtime) -> State:
    """Opens and sweeps the state. Raises CatalogueUnusable, StateInUse, and SettingsError for a
    directory that is not obdelta's or cannot be written.
    """
    configured, reactor, threads = runtime.settings, runtime.reactor, runtime.threads
    add_stop = runtime.services.add_stop
    try:
        claimed = await threads.run(claim, configured.state_dir)
        lock = StateLock.take(configured.state_dir)
        add_stop(lock.release)
        blobs = BlobStore(configured.state_dir, threads)
    except OSError as error:
        raise SettingsError(
            "state-dir",
            str(configured.state_dir),
            f"a directory that can be written ({error.strerror})",
        ) from error
    claimed.report()
    with _swept(configured):
        await blobs.sweep()
    catalogue = await Catalogue.open(
        configured.state_dir / CATALOGUE, reactor, blobs=blobs, recipe=RECIPE
    )
    add_stop(catalogue.close)
    running = RunMarker(configured.state_dir, threads, reactor)

    async def known_blobs() -> frozenset[Digest]:
        return await catalogue.blob_digests() | KEPT

    with _swept(configured):
        await running.begin(known_blobs)
    add_stop(running.end)
    clock = time.time
    await catalogue.correct_times(int(clock()))
    with _swept(configured):
        await catalogue.sweep(
            blobs, KEPT, recipe=RECIPE, before=int(clock() - configured.keep_served)
        )
        layers = await LayerCache.open(configured.state_dir, threads, clock)
        trees = await TreeCache.open(configured.state_dir, threads, clock)
        fetched = await UpstreamBlobCache.open(configured.state_dir, threads, clock)
    caches: dict[str, Cache[Any]] = {"layers": layers, "trees": trees, "upstream": fetched}
    for cache in caches.values():
        cache.steady = reactor.seconds
    service = make_quota_service(runtime, blobs, catalogue, caches, lock)
    add_stop(service.wait_until_idle)
    return State(
        threads=threads,
        blobs=blobs,
        catalogue=catalogue,
        layers=layers,
        trees=trees,
        upstream_blobs=fetched,
        quota_service=service,
    )


@contextlib.contextmanager
def _swept(configured: Settings) -> Iterator[None]:
    """Raises SettingsError for what keeps a start from removing an earlier run's files."""
    try:
        yield
    except OSError as error:
        raise SettingsError(
            "state-dir",
            str(configured.state_dir),
            "a directory in which obdelta can remove what an earlier run left"
            f" ({files.error_for_log(error)}): check its owner and mode, or move it away",
        ) from error


def make_quota_service(
    runtime: Runtime,
    blobs: BlobStore,
    catalogue: Catalogue,
    caches: Mapping[str, Cache[Any]],
    lock: StateLock,
) -> QuotaService:
    """Returns the one quota over deltas and all caches."""
    configured, quota = runtime.settings, runtime.settings.store_quota
    deltas = StoredDeltas(
        catalogue,
        blobs,
        int(configured.keep_served),
        time.time,
        recipe=RECIPE,
        share=quota // FLEETS,
    )
    kinds: dict[str, Evictable] = {"deltas": deltas, **caches}
    service = QuotaService(
        Quota(kinds, quota),
        blobs,
        catalogue.counters.count,
        folders=[blobs.tmp, blobs.root, *(cache.root for cache in caches.values())],
        catalogue=configured.state_dir / CATALOGUE,
        lock=lock,
        deltas=deltas,
        ceiling=quota,
        clock=runtime.reactor,
    )
    for cache in caches.values():
        service.watch(cache)
    service.grew()
    return service
