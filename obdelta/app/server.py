"""The running server: starts its parts in order, and stops them in the reverse order."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, globalLogPublisher
from twisted.python.components import Componentized
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from obdelta.app.builders import (
    make_builders,
    make_coordinator,
    make_pool,
    make_rsync_probe,
    make_upstream_blobs,
)
from obdelta.app.devices import listen_for_devices, make_clients, make_face
from obdelta.app.engine import make_engine
from obdelta.app.expiry import start_expiry
from obdelta.app.factories import make_access, make_certificates, make_policy, make_upstream
from obdelta.app.further_processes import start_further
from obdelta.app.open_files import raise_open_files
from obdelta.app.operators import listen_for_operators, make_operator_face, make_readiness
from obdelta.app.publishing import make_publisher
from obdelta.app.reload import Reload, reload_files
from obdelta.app.replicas import make_replicas, make_shared
from obdelta.app.signals import handle_signals, stop_on_sigterm
from obdelta.app.state import Closers, open_state
from obdelta.builds.service import DeltaService
from obdelta.concurrency.threads import Threads
from obdelta.errors import ObdeltaError
from obdelta.observability import Metrics
from obdelta.registry import CredentialPolicy
from obdelta.settings import Settings

log = Logger()

_THREADS = 8
"""Threads for file work. Hashing and writing are short, and two cores gain nothing from more."""


@implementer(ILogObserver)
class _Counting:
    """Counts log messages by their level."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, event: LogEvent) -> None:
        """Counts one message."""
        level = event.get("log_level")
        if level is not None and level is not LogLevel.debug:
            self._metrics.log_messages.labels(level.name).inc()


class Server(Service):
    """The Twisted service: opens the state, wires the packages, listens, and stops
    all of it again.
    """

    def __init__(
        self,
        configured: Settings,
        reactor: Any,
        observer: ILogObserver | None = None,
        *,
        reload: Reload | None = None,
    ) -> None:
        """``observer`` writes the log from the start of twistd on; None leaves the log to twistd.

        ``reload`` runs at SIGHUP; parts of the server add their steps to it when they exist.
        Without it the settings stay.
        """
        self._settings, self._reactor, self._observer = configured, reactor, observer
        self._reload = reload or Reload(configured, lambda: configured, None)
        self._threads = ThreadPool(1, _THREADS, "obdelta")
        self._ports: list[IListeningPort] = []
        self._starting: Deferred[None] | None = None
        self._closers: Closers = []
        self._drain: Callable[[], Awaitable[None]] | None = None
        self._resuming: Deferred[None] | None = None
        self._metrics = Metrics()
        self._counting = _Counting(self._metrics)

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Registers the log observer with twistd's application, before the log begins."""
        if self._observer is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._observer)  # type: ignore[no-untyped-call] # Twisted's
        super().setServiceParent(parent)  # type: ignore[no-untyped-call] # Twisted's

    def startService(self) -> None:
        """Starts listening once the state is open. A start that fails stops the process with status
        1.
        """
        super().startService()  # type: ignore[no-untyped-call] # Twisted's
        os.umask(0o077)  # for this process and its children: other users must not read their files
        self._threads.start()
        globalLogPublisher.addObserver(self._counting)
        handle_signals(self._reactor, self._reload)
        self._reactor.callWhenRunning(stop_on_sigterm, self._reactor)
        self._starting = ensureDeferred(self._start())
        self._starting.addErrback(self._failed)

    def _failed(self, failure: Any) -> None:
        if failure.check(CancelledError):
            return  # stopped during the start
        if isinstance(failure.value, ObdeltaError | OSError):
            log.critical("obdelta cannot start: {reason}", reason=str(failure.value))
        else:
            log.failure("obdelta cannot start", failure)
        # twistd removes its pid file after the reactor has ended, and then exits with 0. This makes
        # the status 1.
        atexit.register(os._exit, 1)
        self._reactor.callWhenRunning(self._reactor.stop)

    async def _start(self) -> None:
        configured, reactor, closers = self._settings, self._reactor, self._closers
        raise_open_files(configured.max_builds)
        if configured.auth == "none":
            log.warn(
                "AUTH IS OFF (auth = none): whoever reaches this server may pull everything that it"
                " may pull"
            )
        access = make_access(configured, time.time)
        clients = make_clients(configured)
        threads = Threads(reactor, self._threads)
        state = await open_state(configured, reactor, threads, closers)
        upstream = make_upstream(configured, reactor, threads, self._metrics)
        closers.append(upstream.close)
        upstream_blobs = make_upstream_blobs(reactor, state, upstream, closers)
        pool = make_pool(configured, reactor, closers)
        readiness = make_readiness(reactor, upstream, pool)
        engine = make_engine(configured, reactor, state, closers)
        if engine is not None and len(configured.builder) == 1:
            # Without a fallback, nothing can be built while the engine is away.
            readiness.add("engine", engine.why_away)
        probe = await make_rsync_probe(reactor, state, readiness)
        builders = make_builders(
            configured, reactor, state, upstream, upstream_blobs, pool, engine, probe, self._metrics
        )
        shared = make_shared(configured, reactor, readiness, closers)
        publisher = make_publisher(configured, reactor, state, upstream, closers)
        replicas = make_replicas(configured, reactor, state, shared, publisher, closers)
        coordinator = make_coordinator(
            configured, reactor, state, upstream, builders, publisher, replicas, self._metrics
        )
        closers.append(coordinator.close)
        start_expiry(configured, reactor, state.catalogue, closers)
        policy = make_policy(configured)
        face = await make_face(
            configured,
            reactor,
            access=access,
            clients=clients,
            state=state,
            upstream=upstream,
            upstream_blobs=upstream_blobs,
            policy=policy,
            coordinator=coordinator,
            metrics=self._metrics,
            readiness=readiness,
        )
        certificates = make_certificates(configured, reactor.seconds)
        self._reload.steps.append(reload_files(certificates, access))
        self._ports += await listen_for_devices(
            configured, reactor, face, clients, self._metrics, certificates
        )
        further = await start_further(
            configured, reactor, face, self._ports, state, self._metrics, closers
        )
        if further is not None:
            readiness.notes.append(further.describe)
            self._reload.steps.append(further.reload)
        operators = make_operator_face(
            configured,
            reactor,
            state=state,
            upstream=upstream,
            coordinator=coordinator,
            metrics=self._metrics,
            readiness=readiness,
            policy=policy,
            closers=closers,
        )
        self._ports += await listen_for_operators(configured, reactor, operators, self._metrics)

        async def drain() -> None:
            deadline = reactor.seconds() + configured.drain
            if further is not None:
                further.end(configured.drain)
            face.held.stop()
            await coordinator.drain(configured.drain)
            await face.in_flight.drained(deadline - reactor.seconds(), reactor)

        self._drain = drain
        self._resuming = ensureDeferred(self._resume(coordinator, policy))
        for port in self._ports:
            log.info("listening on {address}", address=str(port.getHost()))

    async def _resume(self, coordinator: DeltaService, policy: CredentialPolicy) -> None:
        try:
            resumed = await coordinator.resume(policy.credentials(None))
        except ObdeltaError as error:
            log.warn("queued builds were not resumed: {reason}", reason=str(error))
        except CancelledError:
            return  # stopping: the catalogue still has them
        else:
            if resumed:
                log.info("goes on with {count} builds that were queued", count=resumed)

    def stopService(self) -> Deferred[None]:
        """Stops listening, waits up to ``drain`` for running work, cancels the rest, and closes all
        parts in the reverse order.
        """
        super().stopService()  # type: ignore[no-untyped-call] # Twisted's
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        if self._resuming is not None:
            self._resuming.cancel()
        if self._drain is not None:
            await self._drain()
        for close in reversed(self._closers):
            try:
                await close()
            except (
                Exception
            ):  # a full disk, say: close the rest all the same, or the process never ends
                log.failure("closing what was open")
        globalLogPublisher.removeObserver(self._counting)
        self._threads.stop()
