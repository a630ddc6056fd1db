"""The running server: starts its parts in order, and stops them in the reverse order."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence

from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import ILogObserver, Logger, globalLogPublisher
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.app.access import make_ingress
from obdelta.app.builders import make_builds
from obdelta.app.components import open_components
from obdelta.app.device_processes import DeviceProcesses, start_processes
from obdelta.app.devices import (
    ServerParts,
    listen_for_devices,
    make_device_app,
    open_device_parts,
)
from obdelta.app.operators import listen_for_operators, make_operator_app
from obdelta.app.process import FAILED, UNUSABLE, handle_signals, raise_open_files, stop_on_sigterm
from obdelta.app.runtime import Runtime, Services
from obdelta.app.settings_reload import Reload, reload_files
from obdelta.builds.delta_actions import FAILURE_SECONDS
from obdelta.builds.service import DeltaService
from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.errors import ObdeltaError, SettingsError
from obdelta.net.listen import url
from obdelta.observability import Metrics
from obdelta.observability.logging import LevelCounter
from obdelta.registry import CredentialPolicy
from obdelta.settings import Settings
from obdelta.store import operator_address
from obdelta.store.expiry import make_expiry
from obdelta.web.devices.app import DeviceApp
from obdelta.web.operators.maintenance_api import ReloadApi

log = Logger()

_THREADS = 8
"""Threads for file work. Hashing and writing are short, and two cores gain nothing from more."""


class Server(Services):
    """The Twisted service: opens the components, wires the packages, listens, and stops
    all of it again.

    It stops listening first, then drains, then closes its parts in the reverse order.
    """

    def __init__(
        self,
        configured: Settings,
        reactor: IReactor,
        observer: ILogObserver | None = None,
        *,
        reload: Reload | None = None,
    ) -> None:
        """``observer`` writes the log from the start of twistd on; None leaves the log to twistd.

        ``reload`` runs at SIGHUP; parts of the server add their steps to it when they exist.
        Without it the settings stay.
        """
        super().__init__()
        self._observer = observer
        self._reload = reload or Reload(configured, lambda: configured, None)
        self._pool = ThreadPool(1, _THREADS, "obdelta")
        self._parts, self._work, self._ports = Services(), Services(), Services()
        for services in (self._parts, self._work, self._ports):
            services.setServiceParent(self)  # type: ignore[no-untyped-call] # Twisted's
        self._starting: Deferred[None] | None = None
        self._listening: list[tuple[str, IListeningPort]] = []
        self._runtime = Runtime(
            settings=configured,
            reactor=reactor,
            threads=Threads(reactor, self._pool),
            metrics=Metrics(),
            services=self._parts,
        )

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Registers the log observer with twistd's application, before the log begins."""
        if self._observer is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._observer)  # type: ignore[no-untyped-call] # Twisted's
        super().setServiceParent(parent)  # type: ignore[no-untyped-call] # Twisted's

    def startService(self) -> None:
        """Starts listening once the state is open. A start that fails stops the process with status
        1, or 2 if a setting is the reason.
        """
        super().startService()
        reactor = self._runtime.reactor
        os.umask(0o077)  # for this process and its children: other users must not read their files
        self._pool.start()
        self._parts.add_stop(self._pool.stop)
        count = LevelCounter(self._runtime.metrics)
        globalLogPublisher.addObserver(count)
        self._parts.add_stop(lambda: globalLogPublisher.removeObserver(count))
        handle_signals(reactor, self._reload)
        reactor.callWhenRunning(stop_on_sigterm, reactor)
        self._starting = ensureDeferred(self._start())
        self._starting.addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        if failure.check(CancelledError):
            return  # stopped during the start
        if isinstance(failure.value, ObdeltaError | OSError):
            log.critical("obdelta cannot start: {reason}", reason=str(failure.value))
        else:
            log.failure("obdelta cannot start", failure)
        # twistd removes its pid file after the reactor has ended, and then exits with 0. This sets
        # the status.
        status = UNUSABLE if failure.check(SettingsError) else FAILED
        atexit.register(os._exit, status)
        self._runtime.reactor.callWhenRunning(self._runtime.reactor.stop)

    async def _start(self) -> None:
        runtime, configured = self._runtime, self._runtime.settings
        raise_open_files(configured.max_builds)
        if configured.auth == "none":
            log.warn(
                "AUTH IS OFF (auth = none): anyone who reaches this server may pull everything "
                "that it may pull"
            )
        ingress = make_ingress(runtime)
        parts = await open_components(runtime)
        builds = await make_builds(parts, here=False)
        service, state = builds.service, parts.state
        expiry = make_expiry(runtime.reactor, state.catalogue, FAILURE_SECONDS)
        expiry.setServiceParent(self._parts)
        devices = await open_device_parts(runtime, ingress, state.catalogue, state.blobs)
        server = ServerParts(
            parts=parts, service=service, devices=devices, published=builds.publishers.batches
        )
        app = make_device_app(server)
        self._reload.steps.append(reload_files(ingress))
        ports = await listen_for_devices(devices, app)
        self._add_ports("devices", ports)
        processes = start_processes(server, app, ports)
        if processes is not None:
            parts.readiness.notes.append(processes.describe)
            reload_processes = processes.reload
            self._reload.steps.append(lambda levels, _report: reload_processes(levels))
        operators = await make_operator_app(server)
        ReloadApi(self._reload).add_to(operators.routes)
        operator_ports = await listen_for_operators(runtime, operators)
        self._add_ports("operators", operator_ports)
        self._ports.add_stop(operator_address.record(runtime.settings.state_dir, operator_ports))
        drain = Drain(server, app, processes)
        drain.setServiceParent(self._work)  # type: ignore[no-untyped-call] # Twisted's
        resuming = ensureDeferred(self._resume(service, parts.policy))
        self._work.add_stop(resuming.cancel)
        for who, port in self._listening:
            log.info("{who}: listening on {address}", who=who, address=url(port))

    def _add_ports(self, who: str, ports: Sequence[IListeningPort]) -> None:
        for port in ports:
            self._listening.append((who, port))
            self._ports.add_stop(port.stopListening)

    async def _resume(self, service: DeltaService, policy: CredentialPolicy) -> None:
        try:
            resumed = await service.resume(policy.credentials(None))
        except ObdeltaError as error:
            log.warn("queued builds were not resumed: {reason}", reason=str(error))
        except CancelledError:
            return  # stopping: the catalogue still has them
        else:
            if resumed:
                log.info("{count} queued builds were resumed", count=resumed)

    def stopService(self) -> Deferred[None]:
        """Stops listening, waits up to ``drain`` for running work, cancels the rest, and closes all
        parts in the reverse order.
        """
        if self._starting is not None:
            self._starting.cancel()
        stopped: Deferred[None] = super().stopService()
        return stopped.addErrback(
            lambda failure: log.failure("a part of the server did not stop cleanly", failure)
        )


class Drain(Service):
    """Waits for running work when the server stops, up to the setting ``drain``."""

    def __init__(
        self, server: ServerParts, app: DeviceApp, processes: DeviceProcesses | None
    ) -> None:
        self._server, self._app, self._processes = server, app, processes

    def stopService(self) -> Deferred[None]:
        """Answers held requests, and finishes builds and requests in flight."""
        super().stopService()  # type: ignore[no-untyped-call] # Twisted's
        return ensureDeferred(self._drain())

    async def _drain(self) -> None:
        seconds, reactor = self._server.parts.settings.drain, self._server.parts.reactor
        deadline = reactor.seconds() + seconds
        if self._processes is not None:
            self._processes.end(seconds)
        self._app.held.stop()
        await self._server.service.drain(seconds)
        await self._app.in_flight.drained(deadline - reactor.seconds(), reactor)
