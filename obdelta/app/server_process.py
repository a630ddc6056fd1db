"""``python -m obdelta.app.server_process``: another server process (setting ``processes``). Only
the server starts it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

from twisted.application.internet import TimerService
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IReadDescriptor
from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    Logger,
    globalLogBeginner,
    jsonFileLogObserver,
)
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from obdelta.app.access import make_ingress
from obdelta.app.device_processes import FIRST_PORT, FOLDER, StartMessage
from obdelta.app.devices import make_device_site, open_device_parts
from obdelta.app.process import handle_signals
from obdelta.app.runtime import Runtime, Services
from obdelta.app.settings_reload import ReloadReport, Step, reload_files
from obdelta.concurrency.reactor import IReactor, use_monotonic_time
from obdelta.concurrency.tasks import Threads
from obdelta.delta.build import RECIPE
from obdelta.net.http_limits import accept_few
from obdelta.net.listen import with_layers
from obdelta.net.private_socket import PrivateEndpoint
from obdelta.observability import Metrics
from obdelta.observability.logging import Levels, with_request
from obdelta.processes.server_processes import METRICS, READY, TRACES
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.ownership import CATALOGUE
from obdelta.web.devices.forwarding import Forwarder, ForwardingApp

log = Logger()

_THREADS = 4
_COUNT_EVERY = 2.0
"""Seconds between two reports of counts and requests."""


@implementer(IReadDescriptor)
class _ParentInput:
    """Standard input: passes lines on. Its end is the end of the parent process, and so of the
    service.
    """

    def __init__(self, reactor: IReactor, received: Callable[[bytes], None]) -> None:
        self._reactor, self._received, self._rest = reactor, received, b""

    def fileno(self) -> int:
        """Returns the descriptor of standard input."""
        return 0

    def logPrefix(self) -> str:
        """Returns the prefix for Twisted's log."""
        return "lifeline"

    def doRead(self) -> None:
        """Passes whole lines on."""
        *lines, self._rest = (self._rest + os.read(0, 65536)).split(b"\n")
        for line in lines:
            self._received(line)

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor at the end of standard input."""
        self._reactor.removeReader(self)
        if self._reactor.running:
            self._reactor.stop()


async def serve(
    message: StartMessage, runtime: Runtime
) -> tuple[ForwardingApp, list[IListeningPort], Step]:
    """Opens what the process needs and begins to accept. The caller stops the ports.

    Returns a function that reads files again, as SIGHUP does.
    """
    configured, reactor = runtime.settings, runtime.reactor
    ingress = make_ingress(runtime)
    # The parent process has already opened, swept and migrated the state.
    blobs = BlobStore(configured.state_dir, runtime.threads)
    path = configured.state_dir / CATALOGUE
    catalogue = await Catalogue.open(path, reactor, blobs=blobs, recipe=RECIPE, check=False)
    runtime.services.add_stop(catalogue.close)
    devices = await open_device_parts(runtime, ingress, catalogue, blobs, message.url_key)
    app = ForwardingApp(
        stored=devices.stored,
        admission=devices.admission,
        signer=devices.signer,
        forwarder=Forwarder(
            lambda client: PrivateEndpoint(reactor, FOLDER, client), ingress.forwarded, reactor
        ),
        forward_ping=devices.proxies_ping,
        held=devices.held,
        traces=devices.traces,
    )
    factory: Any = with_layers(
        make_device_site(devices, app),
        reactor,
        certificates=ingress.certificates,
        proxies=ingress.proxies if configured.proxy_protocol else None,
    )
    ports: list[IListeningPort] = []
    for number, family in enumerate(message.families, FIRST_PORT):
        ports.append(reactor.adoptStreamPort(number, socket.AddressFamily(family), factory))
        accept_few(ports[-1])
        os.close(number)
    return app, ports, reload_files(ingress)


class _Process:
    """The process from start to end."""

    def __init__(self, message: StartMessage, reactor: IReactor, levels: Levels) -> None:
        self._message, self._reactor, self._levels = message, reactor, levels
        self._reload_files: Step = lambda _levels, _report: None
        self._pool = ThreadPool(1, _THREADS, "obdelta")
        self._runtime = Runtime(
            settings=message.settings,
            reactor=reactor,
            threads=Threads(reactor, self._pool),
            metrics=Metrics(),
            services=Services(),
        )
        self._app: ForwardingApp | None = None
        self._ports: list[IListeningPort] = []
        self._draining = False

    def run(self) -> None:
        """Runs until it has drained, or the parent process is gone."""
        self._pool.start()
        self._runtime.services.startService()
        # A terminal sends it to the whole group. Only the parent process ends this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Reloads come from the parent process, which has read the settings.
        handle_signals(self._reactor, lambda: None)
        signal.signal(signal.SIGQUIT, lambda *_: self._reactor.callFromThread(self._drain))
        signal.signal(signal.SIGTERM, lambda *_: self._reactor.callFromThread(self._drain))
        self._reactor.callWhenRunning(self._begin)
        self._reactor.addSystemEventTrigger(
            "before", "shutdown", lambda: ensureDeferred(self._close())
        )
        self._reactor.run(installSignalHandlers=False)  # type: ignore[call-arg] # Twisted's own reactors

    def _begin(self) -> None:
        self._reactor.addReader(_ParentInput(self._reactor, self._reload))
        ensureDeferred(self._serve()).addErrback(self._failed)

    def _reload(self, line: bytes) -> None:
        levels: Mapping[str, str] = json.loads(line)["log_level"]
        self._levels.use(levels)
        self._reload_files(levels, ReloadReport())

    async def _serve(self) -> None:
        self._app, self._ports, self._reload_files = await serve(self._message, self._runtime)
        self._write(READY)
        counting = TimerService(_COUNT_EVERY, self._count)
        counting.clock = self._reactor
        counting.setServiceParent(self._runtime.services)

    def _count(self) -> None:
        self._write(METRICS + json.dumps(self._runtime.metrics.snapshot()).encode())
        traces = self._app.traces.unsent() if self._app is not None else []
        if traces:
            self._write(TRACES + json.dumps(traces).encode())

    def _write(self, line: bytes) -> None:
        os.write(1, line + b"\n")

    def _failed(self, failure: Failure) -> None:
        log.failure("a server process cannot start", failure)
        self._reactor.stop()

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            ensureDeferred(self._finish())

    async def _finish(self) -> None:
        """Accepts no more connections, and finishes the requests in flight."""
        while self._ports:
            await maybeDeferred(self._ports.pop().stopListening)
        if self._app is not None:
            self._count()
            log.info("stopping; {count} requests in flight", count=self._app.in_flight.count)
            self._app.held.stop()
            await self._app.in_flight.drained(self._message.settings.drain, self._reactor)
        if self._reactor.running:
            self._reactor.stop()

    async def _close(self) -> None:
        await self._runtime.services.stopService()
        self._pool.stop()


def main() -> None:
    """Reads the first message of the parent process, and serves."""
    with open(0, "rb", buffering=0, closefd=False) as source:
        message: StartMessage = pickle.loads(_read(source, int.from_bytes(_read(source, 4))))  # noqa: S301 - of our own parent
    # The log goes to the parent process, which knows where logs go.
    record = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    write = jsonFileLogObserver(record, "")

    @implementer(ILogObserver)
    def named(event: LogEvent) -> None:
        write(with_request(event))

    levels = Levels(message.settings.log_level)
    observer = FilteringLogObserver(named, [levels])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    reactor = cast(IReactor, installed_reactor)
    use_monotonic_time(reactor)
    _Process(message, reactor, levels).run()


def _read(source: io.FileIO, size: int) -> bytes:
    found = b""
    while len(found) < size:
        chunk = source.read(size - len(found))
        if not chunk:
            raise SystemExit(
                "obdelta.app.server_process is started by twistd obdelta, with processes > 1"
            )
        found += chunk
    return found


if __name__ == "__main__":
    main()
