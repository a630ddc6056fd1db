"""Server processes: starts them, restarts those that die, and drains them when the server stops.

A child receives its start data on standard input. The input then stays open: lines of JSON report
changes, and its end shows the child that the parent is gone. The environment holds what programs
need, and no secret. On standard output the child writes lines: ``ready``, log events as JSON, which
go into this process's log, ``metrics`` with its counts, and ``traces`` with its requests. Listening
sockets and other descriptors are inherited from 3 on.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger, eventFromJSON, globalLogPublisher
from twisted.python.failure import Failure

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Event

log = Logger()

READY, METRICS, TRACES = b"ready", b"metrics ", b"traces "
FIRST_INHERITED = 3
_INHERITED_VARIABLES = re.compile(
    r"(PATH|HOME|LANG|TMPDIR|TZ)|(LC|LD|PYTHON|MALLOC|FAKETIME)[A-Z0-9_]*", re.ASCII
)
"""Variables that a child inherits: those that programs and their libraries read. The settings are
passed on standard input.
"""
_MAX_LINE = 1 << 20
_KILL_AFTER = 5.0
_FIRST_WAIT, _MAX_WAIT = 1.0, 30.0
_HEALTHY_SECONDS = 60.0
"""A child that lived this long is restarted at once; otherwise the delay doubles."""


class Counts(Protocol):
    """Receives the counts of other processes."""

    def absorb(self, source: str, snapshot: Any) -> None:
        """Records what a process has counted since its start. Raises ValueError."""

    def retire(self, source: str) -> None:
        """Records that the process is gone."""


class _Child(ProcessProtocol):
    """One process. ``gone`` happens when it has ended."""

    transport: IProcessTransport

    def __init__(
        self, first_message: bytes, name: str, counts: Counts, traces: Callable[[Any], None]
    ) -> None:
        self.gone = Event()
        self.ready = self.alive = False
        self.name, self._counts, self._traces = name, counts, traces
        self._first_message, self._lines, self._errors = first_message, b"", b""

    def connectionMade(self) -> None:
        self.alive = True
        self.transport.write(len(self._first_message).to_bytes(4) + self._first_message)

    def outReceived(self, data: bytes) -> None:
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._lines) > _MAX_LINE:
            log.error(
                "{name} wrote a line of more than {limit} bytes: it is killed",
                name=self.name,
                limit=_MAX_LINE,
            )
            self.signal(signal.SIGKILL)

    def _line(self, line: bytes) -> None:
        if line == READY:
            self.ready = True
            log.info("{name} is ready (pid {pid})", name=self.name, pid=self.transport.pid)
            return
        if line.startswith(METRICS):
            try:
                self._counts.absorb(self.name, json.loads(line.removeprefix(METRICS)))
            except ValueError as error:
                log.error("{name} sent invalid counts: {reason}", name=self.name, reason=str(error))
            return
        if line.startswith(TRACES):
            try:
                self._traces(json.loads(line.removeprefix(TRACES)))
            except ValueError as error:
                log.error("{name} sent invalid traces: {reason}", name=self.name, reason=str(error))
            return
        try:
            event = eventFromJSON(line.decode("utf-8"))
        except ValueError:
            log.error(
                "{name} wrote a line that is not a log event: {line}",
                name=self.name,
                line=ascii(line[:200]),
            )
            return
        globalLogPublisher(event)

    def errReceived(self, data: bytes) -> None:
        # The interpreter's own last words: everything else comes as events.
        *lines, self._errors = (self._errors + data)[-_MAX_LINE:].split(b"\n")
        for line in lines:
            log.error("{name}: {line}", name=self.name, line=line.decode("utf-8", "replace"))

    def send_line(self, line: bytes) -> None:
        """Sends a line; without effect on a process that is gone."""
        if self.alive:
            self.transport.write(line + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; without effect on a process that is gone."""
        if self.alive:
            self.transport.signalProcess(number)

    def processEnded(self, reason: Failure) -> None:
        self.alive = self.ready = False
        self._counts.retire(self.name)
        self.gone.fire()


class Processes:
    """Keeps ``count`` children of one command running."""

    def __init__(
        self,
        reactor: IReactor,
        command: Sequence[str],
        first_message: bytes,
        inherited: Sequence[int],
        count: int,
        counts: Counts,
        traces: Callable[[Any], None],
    ) -> None:
        """``traces`` receives the requests that a child has served; it raises ValueError for
        invalid input.
        """
        self._reactor, self._command, self.first_message = reactor, list(command), first_message
        self._descriptors: dict[int, Any] = {0: "w", 1: "r", 2: "r"}
        self._descriptors |= {
            FIRST_INHERITED + index: number for index, number in enumerate(inherited)
        }
        self.count, self._counts, self._traces = count, counts, traces
        self._children: dict[int, _Child] = {}
        self._waiting: dict[int, IDelayedCall] = {}
        self._stopping = False
        self._late: IDelayedCall | None = None

    @property
    def ready(self) -> int:
        """The number of children that serve."""
        return sum(child.ready for child in self._children.values())

    def describe(self) -> str:
        """Returns one line for operators."""
        return f"processes: 1 + {self.ready} of {self.count} serve"

    def start(self) -> None:
        """Starts all children."""
        for index in range(self.count):
            self._start(index, _FIRST_WAIT)

    def _start(self, index: int, wait: float) -> None:
        self._waiting.pop(index, None)
        child = _Child(self.first_message, f"process {index + 2}", self._counts, self._traces)
        self._children[index] = child
        began = self._reactor.seconds()
        environment = {
            name: value
            for name, value in os.environ.items()
            if _INHERITED_VARIABLES.fullmatch(name)
        }
        self._reactor.spawnProcess(
            child, self._command[0], self._command, env=environment, childFDs=self._descriptors
        )
        child.gone.wait().addCallback(lambda _: self._restart(child, index, began, wait))

    def _restart(self, child: _Child, index: int, began: float, wait: float) -> None:
        if not self._stopping:
            healthy = self._reactor.seconds() - began >= _HEALTHY_SECONDS
            delay = 0.0 if healthy else wait
            log.error(
                "{name} ended unexpectedly: it is restarted in {delay:g} s",
                name=child.name,
                delay=delay,
            )
            following = _FIRST_WAIT if healthy else min(2 * wait, _MAX_WAIT)
            self._waiting[index] = self._reactor.callLater(delay, self._start, index, following)

    def send_line(self, line: bytes) -> None:
        """Sends a line to all children."""
        for child in self._children.values():
            child.send_line(line)

    def end(self, seconds: float) -> None:
        """Sends SIGTERM to all: they accept nothing more and finish what they serve.

        They have ``seconds`` for that, and are killed when they take much longer. Only the first
        call counts.
        """
        if self._stopping:
            return
        self._stopping = True
        for call in self._waiting.values():
            call.cancel()
        self._waiting.clear()
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        self._late = self._reactor.callLater(seconds + _KILL_AFTER, self._kill)

    def _kill(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    async def ended(self) -> None:
        """Waits until all children have ended. Call :meth:`end` first."""
        for child in self._children.values():
            if child.alive:
                await child.gone.wait()
        if self._late is not None and self._late.active():
            self._late.cancel()
