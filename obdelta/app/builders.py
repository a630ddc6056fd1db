"""Wiring of builds: builders for each delta format, and the service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.app.access import registry_host
from obdelta.app.components import Components
from obdelta.app.shared_builds import Publishers, make_dispatcher, make_publishers, make_replicas
from obdelta.builds.build_metrics import MeasuredBuilds
from obdelta.builds.device_estimates import CommandPrices
from obdelta.builds.engine.api import EngineApi, TlsFiles
from obdelta.builds.engine.builder import EngineV3
from obdelta.builds.engine.fallback import FallbackBuilder
from obdelta.builds.engine.images import Engine
from obdelta.builds.failures import Failures
from obdelta.builds.inputs.tree_inputs import TreeMaker
from obdelta.builds.native_v3 import NativeV3
from obdelta.builds.publish.other_forms import OtherForms
from obdelta.builds.queue import MAX_WAITING, FairQueue
from obdelta.builds.rsync_v2 import RsyncProbe, RsyncV2
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.service import DeltaService
from obdelta.builds.types import Builder
from obdelta.builds.verdicts import FAILURE_MEMORY
from obdelta.concurrency.cores import available_cores
from obdelta.concurrency.limits import Limit
from obdelta.concurrency.tasks import Threads
from obdelta.errors import SettingsError
from obdelta.oci import Form
from obdelta.settings import Settings
from obdelta.store.catalogue.records import Kind

log = Logger()


@dataclass(frozen=True, slots=True)
class Builds:
    """The parts of this server that build deltas."""

    service: DeltaService
    scheduler: Scheduler
    builders: Mapping[Kind, Builder]
    publishers: Publishers


async def make_builds(parts: Components, *, here: bool) -> Builds:
    """Returns the service that runs one build a pair. ``here``: this server builds, whatever the
    setting ``builds``.
    """
    configured, state, publishers = parts.settings, parts.state, make_publishers(parts)
    v3, v2 = make_v3(parts), make_v2(parts)
    failures = Failures(state.catalogue, FAILURE_MEMORY)
    workers = None if here else make_dispatcher(parts, publishers)
    if workers is None:
        await report_rsync(parts, v2.probe)
    builders: Mapping[Kind, Builder] = {"v3": v3, "v2": v2}
    scheduler = Scheduler(
        clock=parts.reactor,
        catalogue=state.catalogue,
        failures=failures,
        queue=FairQueue(configured.max_builds, MAX_WAITING, parts.reactor),
        limit=Limit(configured.max_queued_builds, "builds of one client"),
        build_seconds=configured.build_timeout,
        space=state.quota_service,
        publishers=publishers.by_kind,
        retire=lambda key: state.catalogue.remove([key], state.blobs),
        replicas=make_replicas(parts, publishers),
        workers=workers,
    )
    service = DeltaService(
        clock=parts.reactor,
        catalogue=state.catalogue,
        lookup=parts.lookup,
        builders=builders,
        scheduler=scheduler,
        failures=failures,
        publishers=publishers.by_kind,
        rebuilder=v3 if isinstance(v3, NativeV3) else None,
        other_forms=OtherForms(parts.reactor, state.catalogue, scheduler, failures, v3),
    )
    parts.services.add_stop(service.close)
    MeasuredBuilds(parts.metrics, service)
    return Builds(service, scheduler, builders, publishers)


FORMS: Mapping[str, tuple[Form, ...]] = {
    "auto": tuple(Form),
    **{form.value: (form,) for form in Form},
}
"""The forms that builds make, by the setting ``delta-compression``."""


def engine_target(configured: Settings) -> tuple[str, TlsFiles | None] | None:
    """Returns the host that the engine uses for the registry, and the TLS files for the engine,
    None if it is reached without TLS. None if ``builder`` does not name it. Raises
    SettingsError.
    """
    if "balena-engine" not in configured.builder:
        return None
    host, folder = registry_host(configured, "builder"), configured.docker_cert_path
    if configured.docker_host.startswith("unix:") or folder is None:
        return host, None
    files = TlsFiles.of(folder)
    for path in (files.ca, files.certificate, files.key):
        if not path.is_file():
            raise SettingsError("DOCKER_CERT_PATH", str(folder), f"a directory with {path.name}")
    return host, files


def make_engine(parts: Components) -> Engine | None:
    """Returns the engine with threads of its own, None if ``builder`` does not name it. Raises
    SettingsError.

    Meanwhile, leftovers of an earlier process are removed from the engine.
    """
    configured, services = parts.settings, parts.services
    target = engine_target(configured)
    if target is None:
        return None
    host, files = target
    if files is None and configured.docker_host.startswith("tcp:"):
        log.warn(
            "credentials go to the engine at {url} without TLS: set DOCKER_CERT_PATH",
            url=configured.docker_host,
        )
    # One thread for each build, and one for readiness.
    pool = ThreadPool(0, configured.max_builds + 1, "engine")
    pool.start()
    services.add_stop(pool.stop)
    engine = Engine(
        EngineApi(configured.docker_host, files),
        Threads(parts.reactor, pool),
        host,
        parts.state.catalogue.engine_images,
    )
    if len(configured.builder) == 1:
        # Without a fallback, nothing can be built while the engine is away.
        parts.readiness.add("engine", engine.availability_problem)
    cleanup = ensureDeferred(engine.remove_leftovers())
    cleanup.addErrback(_cleanup_failed)

    async def end() -> None:
        cleanup.cancel()
        await cleanup

    services.add_stop(end)
    return engine


def _cleanup_failed(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.warn(
            "images of earlier builds were not removed from the engine: {reason}",
            reason=failure.getErrorMessage(),
        )


def make_v3(parts: Components) -> Builder:
    """Returns the builder of delta images, or several, of which the second is the fallback."""
    configured = parts.settings
    native, engine = make_native_v3(parts), make_engine(parts)
    if engine is None:
        return native
    builders: dict[str, Builder] = {
        "native": native,
        "balena-engine": EngineV3(
            clock=parts.reactor,
            reactor_call=parts.reactor.callFromThread,
            engine=engine,
            lookup=parts.lookup,
            importer=parts.importer,
            blobs=parts.state.blobs,
            images=parts.images,
            pool=parts.pool,
            threads=available_cores(),
            max_layer=configured.max_image,
            job_seconds=configured.build_timeout,
        ),
    }
    chosen = [builders[name] for name in configured.builder]
    return chosen[0] if len(chosen) == 1 else FallbackBuilder(chosen)


def make_native_v3(parts: Components) -> NativeV3:
    """Returns the builder of delta images that needs no daemon."""
    configured, state = parts.settings, parts.state
    forms = FORMS[configured.delta_compression]
    return NativeV3(
        clock=parts.reactor,
        lookup=parts.lookup,
        importer=parts.importer,
        blobs=state.blobs,
        images=parts.images,
        pool=parts.pool,
        forms=forms,
        effort=configured.effort,
        prices=CommandPrices(configured.device_link, parts.estimates, forms),
        threads=available_cores(),
        index_dir=str(state.layers.root),
        job_seconds=configured.build_timeout,
        metrics=parts.metrics,
    )


async def report_rsync(parts: Components, probe: RsyncProbe) -> None:
    """Logs if rsync cannot be run, and adds it to readiness. v3 works without it."""
    if (unusable := await probe.problem()) is not None:
        log.warn("{unusable}", unusable=unusable)
    parts.readiness.notes.append(probe.note)


def make_v2(parts: Components) -> RsyncV2:
    """Returns the builder of rsync batches."""
    configured, state = parts.settings, parts.state
    trees = TreeMaker(
        importer=parts.importer,
        cache=state.trees,
        blobs=state.blobs,
        pool=parts.pool,
        job_seconds=configured.build_timeout,
        catalogue=state.catalogue,
        metrics=parts.metrics,
    )
    return RsyncV2(
        reactor=parts.reactor,
        lookup=parts.lookup,
        trees=trees,
        blobs=state.blobs,
        catalogue=state.catalogue,
        max_delta_ratio=configured.max_delta_ratio,
        job_seconds=configured.build_timeout,
        # Servers that share builds send finished batches only.
        forecast=configured.v2_streaming == "padded" and configured.shared is None,
        probe=RsyncProbe(parts.threads, parts.reactor.seconds),
    )
