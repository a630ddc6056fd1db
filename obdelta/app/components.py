"""The parts that all other parts of a server use: state, upstream registry, worker processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from obdelta.app.access import make_policy, make_upstream
from obdelta.app.runtime import Runtime
from obdelta.app.state import State, open_state
from obdelta.builds.device_estimates import DeviceEstimates
from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.builds.inputs.delta_tags import DeltaTags
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.publish.publish_image import DeltaImages
from obdelta.concurrency.cores import available_cores
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import CredentialPolicy, Upstream
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
    tags: DeltaTags
    importer: LayerImporter
    images: DeltaImages


async def open_components(runtime: Runtime) -> Components:
    """Opens the state, the upstream and the worker pool. Raises SettingsError, and what
    :func:`obdelta.app.state.open_state` raises.
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
        tags=DeltaTags(state.catalogue, lookup, upstream, time.time),
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
