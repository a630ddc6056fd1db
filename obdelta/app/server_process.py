"""``python -m obdelta.app.server_process``: a further server process (setting ``processes``). Only
the server starts it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IReadDescriptor
from twisted.internet.task import LoopingCall
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

from obdelta.app.further_processes import Beginning, serve_further
from obdelta.app.signals import handle_signals
from obdelta.app.state import Closers
from obdelta.concurrency.clock import use_monotonic_time
from obdelta.concurrency.threads import Threads
from obdelta.observability import Metrics
from obdelta.observability.logging import Levels, with_request
from obdelta.processes.server_processes import METRICS, READY
from obdelta.web.devices.forwarding import ForwardingApp

log = Logger()

_THREADS = 4
_COUNT_EVERY = 2.0
"""Seconds between two reports of counts."""


@implementer(IReadDescriptor)
class _Lifeline:
    """Standard input: passes lines on. Its end is the end of the parent process, and so of the
    service.
    """

    def __init__(self, reactor: Any, received: Callable[[bytes], None]) -> None:
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


class _Running:
    """The process from start to end."""

    def __init__(self, beginning: Beginning, reactor: Any, levels: Levels) -> None:
        self._beginning, self._reactor, self._levels = beginning, reactor, levels
        self._reload_files: Callable[[Mapping[str, str]], None] = lambda _: None
        self._pool = ThreadPool(1, _THREADS, "obdelta")
        self._closers: Closers = []
        self._metrics = Metrics()
        self._face: ForwardingApp | None = None
        self._ports: list[IListeningPort] = []
        self._draining = False

    def run(self) -> None:
        """Runs until it has drained, or the parent process is gone."""
        self._pool.start()
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a terminal sends it to the whole group; only the parent process ends this one
        # Reloads come from the parent process, which has read the settings.
        handle_signals(self._reactor, lambda: None)
        signal.signal(signal.SIGQUIT, lambda *_: self._reactor.callFromThread(self._drain))
        signal.signal(signal.SIGTERM, lambda *_: self._reactor.callFromThread(self._drain))
        self._reactor.callWhenRunning(self._begin)
        self._reactor.addSystemEventTrigger(
            "before", "shutdown", lambda: ensureDeferred(self._close())
        )
        self._reactor.run(installSignalHandlers=False)

    def _begin(self) -> None:
        self._reactor.addReader(_Lifeline(self._reactor, self._reload))
        ensureDeferred(self._serve()).addErrback(self._failed)

    def _reload(self, line: bytes) -> None:
        levels: Mapping[str, str] = json.loads(line)["log_level"]
        self._levels.use(levels)
        self._reload_files(levels)

    async def _serve(self) -> None:
        threads = Threads(self._reactor, self._pool)
        self._face, self._ports, self._reload_files = await serve_further(
            self._beginning, self._reactor, threads, self._metrics, self._closers
        )
        self._say(READY)
        counting = LoopingCall(self._count)
        counting.clock = self._reactor
        counting.start(_COUNT_EVERY)

    def _count(self) -> None:
        self._say(METRICS + json.dumps(self._metrics.snapshot()).encode())

    def _say(self, line: bytes) -> None:
        os.write(1, line + b"\n")

    def _failed(self, failure: Failure) -> None:
        log.failure("a further process cannot start", failure)
        self._reactor.stop()

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            ensureDeferred(self._finish())

    async def _finish(self) -> None:
        """Accepts no more connections, and finishes the requests in flight."""
        while self._ports:
            await maybeDeferred(self._ports.pop().stopListening)
        if self._face is not None:
            self._count()
            log.info("stopping; {count} requests in flight", count=self._face.in_flight.count)
            self._face.held.stop()
            await self._face.in_flight.drained(self._beginning.settings.drain, self._reactor)
        if self._reactor.running:
            self._reactor.stop()

    async def _close(self) -> None:
        for close in reversed(self._closers):
            await close()
        self._pool.stop()


def main() -> None:
    """Reads the first message of the parent process, and serves."""
    with open(0, "rb", buffering=0, closefd=False) as source:
        beginning: Beginning = pickle.loads(_read(source, int.from_bytes(_read(source, 4))))  # noqa: S301 - of our own parent
    # The log goes to the parent process, which knows where logs go.
    record = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    write = jsonFileLogObserver(record, "")

    @implementer(ILogObserver)
    def named(event: LogEvent) -> None:
        write(with_request(event))

    levels = Levels(beginning.settings.log_level)
    observer = FilteringLogObserver(named, [levels])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    use_monotonic_time(installed_reactor)
    _Running(beginning, installed_reactor, levels).run()


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
