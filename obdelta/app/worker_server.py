"""``obdelta worker``: a server without devices, which builds what frontends enqueue in Redis."""

from __future__ import annotations

import hashlib
import socket
from typing import TYPE_CHECKING

from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from obdelta.app.access import push_credentials
from obdelta.app.builders import make_builds
from obdelta.app.components import Components, open_components
from obdelta.app.operators import (
    listen_for_operators,
    make_guard,
    measure_readiness,
    measure_store,
)
from obdelta.app.process import raise_open_files
from obdelta.app.runtime import Runtime
from obdelta.app.server import Server
from obdelta.app.shared_builds import make_client, make_jobs
from obdelta.builds.delta_actions import FAILURE_SECONDS
from obdelta.builds.inputs.pair_resolver import PairResolver
from obdelta.builds.service import DeltaService
from obdelta.concurrency.tasks import Threads
from obdelta.errors import SettingsError
from obdelta.net.listen import url
from obdelta.store import operator_address
from obdelta.store.expiry import make_expiry
from obdelta.web.operators.app import Description, OperatorApp
from obdelta.web.operators.health import MetricsPage
from obdelta.web.operators.status_api import BuildsApi

if TYPE_CHECKING:
    from obdelta.builds.workers.job_loop import JobLoops
    from obdelta.builds.workers.job_runner import JobRunner

log = Logger()

_LOOK_EVERY = 0.1
"""Seconds between two checks whether the last job has ended, while the worker stops."""


class WorkerServer(Server):
    """Opens what builds need, and takes jobs. Only operators can connect to it."""

    async def _start(self) -> None:
        runtime, configured = self._runtime, self._runtime.settings
        raise_open_files(configured.max_builds)
        jobs_of = make_jobs(runtime)
        from obdelta.builds.workers.job_loop import JobLoops
        from obdelta.builds.workers.job_runner import JobRunner

        parts = await open_components(runtime)
        builds = await make_builds(parts, here=True)
        if builds.publishers.images is None:
            raise SettingsError("shared", None, "the URL of a Redis server, which workers need")
        expiry = make_expiry(runtime.reactor, parts.state.catalogue, FAILURE_SECONDS)
        expiry.setServiceParent(self._parts)
        await parts.state.catalogue.pending_builds.forget_all()
        worker, slots = name_of_worker(runtime), configured.max_builds
        pool = ThreadPool(0, slots + 2, "jobs")
        pool.start()
        runtime.services.add_stop(pool.stop)
        threads = Threads(runtime.reactor, pool)
        client = make_client(runtime)
        own_jobs = jobs_of(client)

        async def report_base(base: str) -> None:
            await threads.run(own_jobs.try_report_base, base, worker)

        runner = JobRunner(
            reactor=runtime.reactor,
            upstream=parts.upstream,
            pairs=PairResolver(parts.lookup, runtime.reactor),
            builders=builds.builders,
            scheduler=builds.scheduler,
            publishers=builds.publishers.by_kind,
            credentials=push_credentials(configured),
            push_seconds=configured.build_timeout,
            report_base=report_base,
            waited=lambda queue, seconds: runtime.metrics.job_wait.labels(queue).observe(seconds),
        )
        loops = JobLoops(
            lambda: make_client(runtime), jobs_of, worker, slots, runner.start, runner.is_free
        )
        parts.readiness.notes.append(
            lambda: (
                f"jobs: {runner.running} of {slots} slots are busy"
                if loops.problem is None
                else f"jobs: Redis is unavailable: {loops.problem}: none is taken"
            )
        )
        await self._open_operators(parts, builds.service)
        jobs = _Jobs(runtime, threads, loops, runner)
        jobs.setServiceParent(self._work)  # type: ignore[no-untyped-call] # Twisted's
        jobs.begin()
        for who, port in self._listening:
            log.info("{who}: listening on {address}", who=who, address=url(port))
        log.info("worker {worker} takes {slots} jobs at a time", worker=worker, slots=slots)

    async def _open_operators(self, parts: Components, service: DeltaService) -> None:
        """Opens the operators' endpoint with health, metrics, and the builds under way."""
        app = OperatorApp(await make_guard(parts), parts.settings.operator_hosts or ())
        Description().add_to(app.routes)
        parts.readiness.add("store", parts.state.quota_service.problem)
        parts.readiness.add_to(app.routes)
        BuildsApi(service, parts.state.catalogue.named_images, parts.reactor).add_to(app.routes)
        measure_store(parts)
        measure_readiness(parts)
        MetricsPage(parts.metrics).add_to(app.routes)
        ports = await listen_for_operators(parts, app)
        self._add_ports("operators", ports)
        self._ports.add_stop(operator_address.record(parts.settings.state_dir, ports))


def name_of_worker(runtime: Runtime) -> str:
    """Returns a name that stays the same over restarts, as the indexes in ``state-dir`` do."""
    text = f"{socket.gethostname()} {runtime.settings.state_dir}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Jobs(Service):
    """Takes jobs; at the stop, lets those under way end for ``drain`` seconds."""

    def __init__(
        self, runtime: Runtime, threads: Threads, loops: JobLoops, runner: JobRunner
    ) -> None:
        self._runtime, self._threads = runtime, threads
        self._loops, self._runner = loops, runner
        self._serving: list[Deferred[None]] = []

    def begin(self) -> None:
        """Starts the threads."""
        self._serving = [self._threads.start(self._loops.report_alive)]
        slots = self._runtime.settings.max_builds
        self._serving += [self._threads.start(self._loops.serve) for _ in range(slots)]

    def stopService(self) -> Deferred[None]:
        """Takes no further job; what runs after ``drain`` seconds is left to other workers."""
        super().stopService()  # type: ignore[no-untyped-call] # Twisted's
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        reactor = self._runtime.reactor
        deadline = reactor.seconds() + self._runtime.settings.drain
        self._loops.stop()
        while self._runner.running and reactor.seconds() < deadline:
            await deferLater(reactor, _LOOK_EVERY)
        self._runner.stop()
        for thread in self._serving:
            await thread
