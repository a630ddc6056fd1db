"""Runs the recorder (:mod:`obdelta.rsync.recorder`) as a child process of the reactor, with limits
on everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.defer import CancelledError
from twisted.internet.error import ProcessDone
from twisted.internet.interfaces import (
    IDelayedCall,
    IProcessTransport,
    IReactorProcess,
    IReactorTime,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Event
from obdelta.errors import (
    BatchInvalid,
    ObdeltaError,
    ProofFailed,
    StoreFull,
    WorkerFailed,
    WorkTooLong,
)
from obdelta.oci import Digest
from obdelta.rsync.batch import DEFAULT_TUNING, Tuning

log = Logger()

_MAX_LINE = 1 << 16
_MAX_STDERR = 4096
_KEPT = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH")


class RecordingJob(NamedTuple):
    """A job for the recorder. ``base`` and ``target`` are trees of
    :func:`obdelta.rootfs.unpack.unpack` (their ``root``).

    ``out`` must not exist; the caller removes it after a failure. ``scratch`` must not exist and is
    on the trees' file system. It is removed soon afterwards; if the child had to be killed, the
    caller removes it. ``forecast`` requests the number of bytes still to come, which costs a
    comparison of the trees.
    """

    base: Path
    target: Path
    docker_config: Mapping[str, Any] | None
    out: Path
    scratch: Path
    forecast: bool = False
    tuning: Tuning = DEFAULT_TUNING


class RecordedStream(NamedTuple):
    """A complete stream: ``size`` in bytes with its header, ``entries`` of the target, ``seconds``
    to write it.

    ``tail`` is where it may be padded, in bytes before its end
    (:mod:`obdelta.rsync.no_op_padding`). ``shares`` are the files that made it large, as
    :meth:`obdelta.rsync.file_costs.FileCosts.totals` returns them, and ``head``, the bytes before
    them; None if that is not known. ``sent_index``: see
    :class:`obdelta.rsync.file_records.Transfers`.
    """

    size: int
    digest: Digest
    tail: int
    entries: int
    seconds: float
    shares: Mapping[str, Any] | None = None
    sent_index: int | None = None


class Limits(NamedTuple):
    """Limits in seconds: ``idle`` without a sign of life, ``total`` from start to end, ``grace``
    between TERM and KILL.
    """

    idle: float = 300.0
    total: float = 7200.0
    grace: float = 10.0


DEFAULT_LIMITS = Limits()


class RsyncRun:
    """Runs the child; reusable, also concurrently. ``reactor`` provides processes and time."""

    def __init__(
        self, reactor: IReactor, limits: Limits = DEFAULT_LIMITS, niceness: int = 10
    ) -> None:
        self._processes: IReactorProcess = reactor
        self._time: IReactorTime = reactor
        self._limits, self._niceness = limits, niceness

    async def run(
        self,
        order: RecordingJob,
        *,
        grew: Callable[[int, int | None], None] | None = None,
        recorded: Callable[[RecordedStream], None] | None = None,
        seconds: float | None = None,
    ) -> RecordedStream:
        """Records and proves the stream, within ``seconds`` if given.

        The child has ended when this raises; when this returns, it may still be tidying up.
        ``grew`` gets the size of the part of ``out`` that will not change, and the most bytes still
        to come (None: not known). ``recorded`` gets the stream that is proven next. Raises
        BatchInvalid, ProofFailed, StoreFull, WorkTooLong, WorkerFailed (with rsync's own output).
        Cancelling stops the child and waits for its end.
        """
        limits = self._limits if seconds is None else self._limits._replace(total=seconds)
        child = _Child(self._time, limits, grew, recorded)
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        command = [sys.executable, "-P", "-m", "obdelta.rsync.recorder"]
        self._processes.spawnProcess(child, command[0], command, env=environment)
        child.transport.write(json.dumps(self._job(order)).encode("ascii") + b"\n")
        try:
            return await child.outcome()
        except CancelledError:
            child.stop("it was cancelled")
            await child.ended.wait()
            raise

    def _job(self, order: RecordingJob) -> dict[str, Any]:
        return {
            "base": str(order.base),
            "target": str(order.target),
            "docker_config": order.docker_config,
            "out": str(order.out),
            "scratch": str(order.scratch),
            "level": order.tuning.level,
            "block": order.tuning.block,
            "forecast": order.forecast,
            "niceness": self._niceness,
            "parent": os.getpid(),
        }


class _Child(ProcessProtocol):
    transport: IProcessTransport

    def __init__(
        self,
        clock: IReactorTime,
        limits: Limits,
        grew: Callable[[int, int | None], None] | None,
        recorded: Callable[[RecordedStream], None] | None,
    ) -> None:
        self._clock, self._limits = clock, limits
        self._grew, self._on_recorded = grew, recorded
        self._buffer = self._stderr = b""
        self._recorded: RecordedStream | None = None
        self._error: ObdeltaError | None = None
        self._proven = False
        self._decided = Event()
        """The stream is proven, or the process has ended."""
        self.ended = Event()
        """The process has ended."""
        self._total = clock.callLater(
            limits.total, self._overdue, f"it took more than {limits.total:g} seconds"
        )
        self._idle = clock.callLater(
            limits.idle, self._overdue, f"it did nothing for {limits.idle:g} seconds"
        )
        self._kill: IDelayedCall | None = None
        self._pid: int | None = None

    def connectionMade(self) -> None:
        self._pid = self.transport.pid

    async def outcome(self) -> RecordedStream:
        """Returns the stream as soon as it is proven. Raises the reason if the process ends without
        one.
        """
        await self._decided.wait()
        if self._error is not None:
            raise self._error
        if self._recorded is None or not self._proven:
            raise WorkerFailed("the recorder ended before its work was done")
        return self._recorded

    def _overdue(self, why: str) -> None:
        self.stop(why, WorkTooLong)

    def stop(self, why: str, error: type[WorkerFailed] = WorkerFailed) -> None:
        """Sends TERM to the child and its process group, and KILL if it still runs after the grace
        period.
        """
        if self._error is None:
            self._error = error(f"rsync was stopped: {why}")
        if not self.ended.happened and self._kill is None:
            self._kill = self._clock.callLater(self._limits.grace, self._signal, signal.SIGKILL)
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        pid = self.transport.pid
        if self.ended.happened or pid is None:
            return
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it does not lead its group yet
            os.kill(pid, number)

    # -- called by Twisted --

    def outReceived(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _MAX_LINE:
            self.stop("it answered with a line that is too long")
        if self._idle.active():
            self._idle.reset(self._limits.idle)
        try:
            for line in lines:
                self._line(json.loads(line))
        except ValueError:
            self.stop("it answered with invalid JSON")

    def _line(self, value: dict[str, Any]) -> None:
        if self._error is not None:
            return
        if "size" in value:
            if self._grew is not None:
                self._grew(value["size"], value["rest"])
        elif "recorded" in value:
            stream = value["recorded"]
            self._recorded = RecordedStream(
                stream["size"],
                Digest(stream["sha256"]),
                stream["tail"],
                stream["entries"],
                stream["seconds"],
                stream["shares"],
                stream["sent_index"],
            )
            if self._on_recorded is not None:
                self._on_recorded(self._recorded)
        elif "proven" in value:
            self._proven = True
            self._decided.fire()
        elif "error" in value:
            self._error = _error(value["error"]["type"], value["error"]["why"])

    def errReceived(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-_MAX_STDERR:]

    def processExited(self, reason: Failure) -> None:
        if not reason.check(ProcessDone) and self._pid is not None:
            with suppress(ProcessLookupError):  # the rsync of a recorder that was killed
                os.killpg(self._pid, signal.SIGKILL)

    def processEnded(self, reason: Failure) -> None:
        for call in (self._total, self._idle, self._kill):
            if call is not None and call.active():
                call.cancel()
        if self._stderr:
            log.warn(
                "recorder wrote to stderr: {output}",
                output=self._stderr.decode("utf-8", "replace").strip(),
            )
        if not reason.check(ProcessDone) and self._error is None:
            self._error = WorkerFailed("the recorder ended before its work was done")
        self._decided.fire()
        self.ended.fire()


def _error(kind: str, why: str) -> ObdeltaError:
    if kind == "ProofFailed":
        return ProofFailed("the target", why)
    plain: Mapping[str, type[ObdeltaError]] = {"BatchInvalid": BatchInvalid, "StoreFull": StoreFull}
    return plain.get(kind, WorkerFailed)(why)
