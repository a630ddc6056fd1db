"""Server processes: starts them, restarts those that die, and drains them when the server stops.

A child receives its start data on standard input. The input then stays open: lines of JSON report
changes, and its end shows the child that the parent is gone. The environment holds what programs
need, and no secret. On standard output the child writes lines: ``ready``, log events as JSON, which
go into this process's log, and ``metrics`` with its counts. Listening sockets and other descriptors
are inherited from 3 on.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger, eventFromJSON, globalLogPublisher
from twisted.python.failure import Failure

log = Logger()

READY, METRICS = b"ready", b"metrics "
FIRST_INHERITED = 3
_KEPT = re.compile(r"(PATH|HOME|LANG|TMPDIR|TZ)|(LC|LD|PYTHON|MALLOC|FAKETIME)[A-Z0-9_]*", re.ASCII)
"""Variables that a child inherits: those that programs and their libraries read. The settings are
passed on standard input.
"""
_MAX_LINE = 1 << 20
_KILL_AFTER = 5.0
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_SOUND_SECONDS = 60.0
"""A child that lived this long is restarted at once; otherwise the delay doubles."""


class Counts(Protocol):
    """Receives the counts of other processes."""

    def absorb(self, source: str, snapshot: Any) -> None:
        """Records what a process has counted since its start. Raises ValueError."""

    def retire(self, source: str) -> None:
        """Records that the process is gone."""


class _Child(ProcessProtocol):
    """One process. ``gone`` fires when it has ended."""

    transport: IProcessTransport

    def __init__(self, beginning: bytes, name: str, counts: Counts) -> None:
        self.gone: Deferred[_Child] = Deferred()
        self.ready = self.alive = False
        self.name, self._counts = name, counts
        self._beginning, self._lines, self._errors = beginning, b"", b""

    def connectionMade(self) -> None:
        self.alive = True
        self.transport.write(len(self._beginning).to_bytes(4) + self._beginning)

    def outReceived(self, data: bytes) -> None:
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._lines) > _MAX_LINE:
            log.error("{name} writes what is no log", name=self.name)
            self.signal(signal.SIGKILL)

    def _line(self, line: bytes) -> None:
        if line == READY:
            self.ready = True
            log.info("{name} serves (pid {pid})", name=self.name, pid=self.transport.pid)
            return
        if line.startswith(METRICS):
            try:
                self._counts.absorb(self.name, json.loads(line.removeprefix(METRICS)))
            except ValueError as error:
                log.error("{name} counts wrongly: {reason}", name=self.name, reason=str(error))
            return
        try:
            event = eventFromJSON(line.decode("utf-8"))
        except ValueError:
            log.error(
                "{name} writes what is no log: {line}", name=self.name, line=ascii(line[:200])
            )
            return
        globalLogPublisher(event)

    def errReceived(self, data: bytes) -> None:
        # The interpreter's own last words: everything else comes as events.
        *lines, self._errors = (self._errors + data)[-_MAX_LINE:].split(b"\n")
        for line in lines:
            log.error("{name}: {line}", name=self.name, line=line.decode("utf-8", "replace"))

    def tell(self, line: bytes) -> None:
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
        self.gone.callback(self)


class Processes:
    """Keeps ``wanted`` children of one command running."""

    def __init__(
        self,
        reactor: Any,
        command: Sequence[str],
        beginning: bytes,
        inherited: Sequence[int],
        wanted: int,
        counts: Counts,
    ) -> None:
        self._reactor, self._command, self.beginning = reactor, list(command), beginning
        self._descriptors: dict[int, Any] = {0: "w", 1: "r", 2: "r"}
        self._descriptors |= {
            FIRST_INHERITED + place: number for place, number in enumerate(inherited)
        }
        self.wanted, self._counts = wanted, counts
        self._children: dict[int, _Child] = {}
        self._waiting: dict[int, IDelayedCall] = {}
        self._stopping = False
        self._late: IDelayedCall | None = None

    @property
    def ready(self) -> int:
        """The number of children that serve."""
        return sum(child.ready for child in self._children.values())

    def describe(self) -> str:
        """Returns one line for people."""
        return f"processes: 1 + {self.ready} of {self.wanted} serve"

    def start(self) -> None:
        """Starts all children."""
        for place in range(self.wanted):
            self._start(place, _FIRST_WAIT)

    def _start(self, place: int, wait: float) -> None:
        self._waiting.pop(place, None)
        child = _Child(self.beginning, f"process {place + 2}", self._counts)
        self._children[place] = child
        began = self._reactor.seconds()
        environment = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
        self._reactor.spawnProcess(
            child, self._command[0], self._command, env=environment, childFDs=self._descriptors
        )
        child.gone.addCallback(self._gone, place, began, wait)

    def _gone(self, child: _Child, place: int, began: float, wait: float) -> _Child:
        if not self._stopping:
            sound = self._reactor.seconds() - began >= _SOUND_SECONDS
            delay = 0.0 if sound else wait
            log.error(
                "{name} is gone, another one starts in {delay:g} s", name=child.name, delay=delay
            )
            following = _FIRST_WAIT if sound else min(2 * wait, _LONGEST_WAIT)
            self._waiting[place] = self._reactor.callLater(delay, self._start, place, following)
        return child

    def tell(self, line: bytes) -> None:
        """Sends a line to all children."""
        for child in self._children.values():
            child.tell(line)

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
                ended: Deferred[None] = Deferred()
                child.gone.addCallback(_pass_on, ended)
                await ended
        if self._late is not None and self._late.active():
            self._late.cancel()


def _pass_on(child: _Child, ended: Deferred[None]) -> _Child:
    ended.callback(None)
    return child
