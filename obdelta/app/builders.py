"""Wiring of builds: the worker pool, a builder for each delta format, and the build service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.logger import Logger

from obdelta.app.state import Closers, State
from obdelta.builds.build_metrics import MeasuredBuilds
from obdelta.builds.engine.builder import EngineV3
from obdelta.builds.engine.images import Engine
from obdelta.builds.fallback import FirstThatWorks
from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.inputs.tree_inputs import TreeMaker
from obdelta.builds.native_v3 import NativeV3
from obdelta.builds.publish_image import DeltaImages
from obdelta.builds.replicas.turns import Replicas
from obdelta.builds.rsync_probe import RsyncProbe
from obdelta.builds.rsync_v2 import RsyncV2
from obdelta.builds.service import DeltaService, Publisher
from obdelta.builds.types import Builder
from obdelta.concurrency.cores import available_cores
from obdelta.concurrency.limits import Limit
from obdelta.observability import Metrics
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Upstream
from obdelta.settings import Settings
from obdelta.store.catalogue.records import Kind
from obdelta.web.operators.health import Readiness

log = Logger()

WORKER_NICENESS = 10
MOST_READY = 4
"""Most idle workers that are kept ready. There is one a core up to this, at 30 MB each."""


def make_upstream_blobs(
    reactor: Any, state: State, upstream: Upstream, closers: Closers
) -> UpstreamBlobs:
    """Returns the fetcher of upstream blobs that devices and builds share."""
    blobs = UpstreamBlobs(
        upstream, state.upstream_blobs, state.threads, reactor, state.upkeep.make_room
    )
    closers.append(blobs.close)
    return blobs


def make_pool(configured: Settings, reactor: Any, closers: Closers) -> WorkerPool:
    """Returns the worker pool that all builders share."""
    ready = min(available_cores(), MOST_READY)
    pool = WorkerPool(
        reactor, configured.max_builds + 1, configured.worker_memory, WORKER_NICENESS, ready
    )
    closers.append(pool.close)
    pool.warm_up()
    return pool


async def make_rsync_probe(reactor: Any, state: State, readiness: Readiness) -> RsyncProbe:
    """Looks for rsync once, and logs where it cannot be run. v3 works without it."""
    probe = RsyncProbe(state.threads, reactor.seconds)
    if (unusable := await probe.problem()) is not None:
        log.warn("{unusable}", unusable=unusable)
    readiness.notes.append(probe.note)
    return probe


def make_builders(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    upstream_blobs: UpstreamBlobs,
    pool: WorkerPool,
    engine: Engine | None,
    probe: RsyncProbe,
    metrics: Metrics,
) -> Mapping[Kind, Builder]:
    """Returns a builder for each delta format. They share the workers and the fetched layers."""
    importer = make_importer(configured, state, upstream_blobs, pool, metrics)
    return {
        "v3": make_v3(configured, reactor, state, upstream, pool, importer, engine, metrics),
        "v2": make_v2(configured, reactor, state, upstream, pool, importer, probe, metrics),
    }


def make_importer(
    configured: Settings,
    state: State,
    upstream_blobs: UpstreamBlobs,
    pool: WorkerPool,
    metrics: Metrics,
) -> LayerImporter:
    """Returns the importer that puts inflated upstream layers into the cache."""
    return LayerImporter(
        upstream=upstream_blobs,
        blobs=state.blobs,
        cache=state.layers,
        catalogue=state.catalogue,
        pool=pool,
        max_layer=configured.max_layer,
        max_image=configured.max_image,
        job_seconds=configured.build_timeout,
        metrics=metrics,
        streams=configured.max_builds,
    )


def make_v3(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    pool: WorkerPool,
    importer: LayerImporter,
    engine: Engine | None,
    metrics: Metrics,
) -> Builder:
    """Returns the builder of delta images, or several, of which the second is the fallback."""
    native = make_native_v3(configured, reactor, state, upstream, pool, importer, metrics)
    if engine is None:
        return native
    builders: dict[str, Builder] = {
        "native": native,
        "balena-engine": EngineV3(
            clock=reactor,
            reactor_call=reactor.callFromThread,
            engine=engine,
            upstream=upstream,
            importer=importer,
            blobs=state.blobs,
            images=make_delta_images(configured, reactor, state),
            pool=pool,
            threads=available_cores(),
            max_layer=configured.max_layer,
            job_seconds=configured.build_timeout,
        ),
    }
    chosen = [builders[name] for name in configured.builder]
    return chosen[0] if len(chosen) == 1 else FirstThatWorks(chosen)


def make_native_v3(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    pool: WorkerPool,
    importer: LayerImporter,
    metrics: Metrics,
) -> NativeV3:
    """Returns the builder of delta images that needs no daemon."""
    return NativeV3(
        clock=reactor,
        upstream=upstream,
        importer=importer,
        blobs=state.blobs,
        images=make_delta_images(configured, reactor, state),
        pool=pool,
        effort=configured.effort,
        threads=available_cores(),
        index_dir=str(state.layers.root),
        job_seconds=configured.build_timeout,
        metrics=metrics,
    )


def make_delta_images(configured: Settings, reactor: Any, state: State) -> DeltaImages:
    """Returns what publishes finished v3 deltas, whichever builder made them."""
    return DeltaImages(
        clock=reactor, blobs=state.blobs, catalogue=state.catalogue, worth=configured.worth
    )


def make_v2(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    pool: WorkerPool,
    importer: LayerImporter,
    probe: RsyncProbe,
    metrics: Metrics,
) -> RsyncV2:
    """Returns the builder of rsync batches."""
    trees = TreeMaker(
        importer=importer,
        cache=state.trees,
        blobs=state.blobs,
        pool=pool,
        job_seconds=configured.build_timeout,
        catalogue=state.catalogue,
        metrics=metrics,
    )
    return RsyncV2(
        reactor=reactor,
        upstream=upstream,
        trees=trees,
        blobs=state.blobs,
        catalogue=state.catalogue,
        worth=configured.worth,
        job_seconds=configured.build_timeout,
        forecast=configured.v2_streaming == "padded",
        probe=probe,
    )


def make_coordinator(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    builders: Mapping[Kind, Builder],
    publisher: Publisher | None,
    replicas: Replicas | None,
    metrics: Metrics,
) -> DeltaService:
    """Returns the service that runs one build a pair. The caller registers its ``close``."""
    v3 = builders.get("v3")
    coordinator = DeltaService(
        clock=reactor,
        catalogue=state.catalogue,
        lookup=ImageLookup(upstream, reactor),
        builders=builders,
        max_builds=configured.max_builds,
        build_seconds=configured.build_timeout,
        failure_memory=configured.failure_memory,
        queued=Limit(configured.max_queued_builds, "builds of one client"),
        publisher=publisher,
        max_queue=configured.max_queue,
        make_room=state.upkeep.make_room,
        admit=state.upkeep.admit,
        built=state.upkeep.grew,
        rebuilder=v3 if isinstance(v3, NativeV3) else None,
        retire=lambda key: state.catalogue.remove([key], state.blobs),
        replicas=replicas,
    )
    MeasuredBuilds(metrics, coordinator)
    return coordinator
