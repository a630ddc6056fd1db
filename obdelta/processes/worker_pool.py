"""Pool of worker processes: gives them jobs, and reports those that die, which ends the job.

"Worker" here means such a process, not ``obdelta worker``. If a job is cancelled or exceeds its
time, its worker is killed (SIGKILL: the work is pure CPU and owns nothing that needs cleaning up).
If a worker dies by itself, its job fails with WorkerFailed. After such a failure, whatever its
cause, no worker that has done a job before is used again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.interfaces import (
    IDelayedCall,
    IProcessTransport,
    IReactorProcess,
    IReactorTime,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta import errors
from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Event
from obdelta.errors import Cancelled, ObdeltaError, WorkerFailed, WorkTooLong
from obdelta.observability.logging import current_request
from obdelta.processes.worker_main import Json, error_from_json

log = Logger()

_ERRORS: dict[str, type[ObdeltaError]] = {
    name: cls
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, ObdeltaError)
}
_MAX_LINE = 64 * 1024 * 1024
_MAX_STDERR = 4096
IDLE_SECONDS = 30.0
"""Seconds for which an idle worker is kept."""
JOBS_PER_WORKER = 64
"""A fresh worker takes over after this many jobs, so that a fragmented heap does not live for ever.
"""


class _Worker(ProcessProtocol):
    """One child. ``job`` is the Deferred of the job under way."""

    transport: IProcessTransport

    def __init__(self, forget: Callable[[_Worker], None]) -> None:
        self._forget = forget
        self._pieces: list[bytes] = []
        self._size = 0
        self._stderr = b""
        self._job: Deferred[Json] | None = None
        self._progress: Callable[[Json], None] | None = None
        self.gone = Event()
        self.killed = False
        self.jobs = 0
        self.request = ""
        self.expiry: IDelayedCall | None = None
        self.pid: int | None = None

    def connectionMade(self) -> None:
        self.pid = self.transport.pid

    def start(self, job: Json, progress: Callable[[Json], None] | None) -> Deferred[Json]:
        """Sends a job; the Deferred's canceller kills the worker."""
        self.jobs += 1
        self._progress = progress
        self._job = Deferred(lambda _: self.kill())
        self.transport.write(
            json.dumps({**job, "parent": os.getpid()}, separators=(",", ":")).encode() + b"\n"
        )
        return self._job

    def kill(self) -> None:
        """Sends SIGKILL; a job under way fails when the process has ended. The worker gets no
        further job.
        """
        self.killed = True
        if not self.gone.happened:
            try:
                self.transport.signalProcess(signal.SIGKILL)
            except ProcessLookupError:
                log.debug("worker was already gone")

    def has_ended(self) -> bool:
        """Returns whether the process is dead, even before the reactor has noticed.

        The same cause often kills several workers at once.
        """
        if self.gone.happened:
            return True
        try:
            return (
                self.pid is None
                or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )
        except ChildProcessError:
            return True

    def outReceived(self, data: bytes) -> None:
        # Pieces are joined once a line is whole: a long one arrives in a thousand of them.
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _MAX_LINE:
            self.kill()
            return
        if b"\n" not in data:
            return
        *lines, rest = b"".join(self._pieces).split(b"\n")
        self._pieces, self._size = [rest], len(rest)
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        try:
            value: dict[str, Any] = json.loads(line)
        except ValueError:
            self.kill()
            return
        if "progress" in value:
            if self._progress is not None:
                self._progress(value["progress"])
            return
        job, self._job, self._progress = self._job, None, None
        if job is None:
            self.kill()
        elif job.called:  # cancelled while the answer was on its way
            return
        elif "result" in value:
            job.callback(value["result"])
        else:
            job.errback(error_from_json(value.get("error") or {}, _ERRORS))

    def errReceived(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-_MAX_STDERR:]

    def processEnded(self, reason: Failure) -> None:
        self._forget(self)
        self.gone.fire()
        if self.expiry is not None and self.expiry.active():
            self.expiry.cancel()
        job, self._job = self._job, None
        output = self._stderr.decode("utf-8", "replace").strip()
        if output:
            log.warn(
                "worker process {pid} wrote to stderr: {output}",
                pid=self.pid,
                output=output,
                request=self.request,
            )
        if job is not None and not job.called:
            job.errback(WorkerFailed(_exit_reason(reason)))


def _exit_reason(reason: Failure) -> str:
    if reason.check(ProcessDone):
        return "it ended before its job was done"
    ended = reason.value
    if isinstance(ended, ProcessTerminated):
        if ended.signal is not None:
            return f"it was ended by signal {ended.signal}"
        return f"it ended with status {ended.exitCode}"
    return "it ended in an unknown way"


class WorkerPool:
    """Runs at most ``size`` worker processes at a time; further jobs wait in order.

    ``ready`` of them exist even without work, from :meth:`warm_up` on, so that no job waits for a
    process to start (a quarter of a second of a processor). One that dies before it had a job is
    replaced only after the next job.
    """

    def __init__(
        self,
        reactor: IReactor,
        size: int,
        memory: int = 0,
        niceness: int = 10,
        ready: int = 0,
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "obdelta.processes.worker_main"),
    ) -> None:
        self._process: IReactorProcess = reactor
        self._time: IReactorTime = reactor
        self._slots = DeferredSemaphore(size)
        self._memory, self._niceness, self._ready, self._command = (
            memory,
            niceness,
            min(ready, size),
            command,
        )
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers (for metrics and tests)."""
        return [worker.pid for worker in self._all if worker.pid is not None]

    def warm_up(self) -> None:
        """Starts worker processes until enough of them are ready."""
        missing = (
            0 if self._closed else self._ready - sum(not worker.killed for worker in self._all)
        )
        try:
            for _ in range(missing):
                self._idle.append(self._spawned())
        except WorkerFailed as error:
            log.warn("no worker process could be started in advance: {reason}", reason=str(error))

    async def run(
        self, job: Json, *, seconds: float, progress: Callable[[Json], None] | None = None
    ) -> Json:
        """Runs one job; ``seconds`` bounds its run (not its wait for a worker).

        Raises the job's own error, WorkTooLong, or another WorkerFailed. Cancelling kills the
        worker, and takes effect when it has ended.
        """
        await self._slots.acquire()
        try:
            if self._closed:
                raise Cancelled("the server is stopping")
            worker = self._take()
            worker.request = current_request()
            done = worker.start({**job, "request": worker.request}, progress)
            overdue = False

            def on_overdue() -> None:
                nonlocal overdue
                overdue = True
                worker.kill()

            timer = self._time.callLater(seconds, on_overdue)
            try:
                return await done
            except (WorkerFailed, CancelledError) as error:
                if isinstance(error, CancelledError):
                    await worker.gone.wait()  # only then are its job's files final
                else:
                    self._kill_used_workers(worker)
                if overdue:
                    raise WorkTooLong(f"the job took more than {seconds:g} seconds") from error
                if self._closed:
                    raise Cancelled("the server is stopping") from error
                raise
            finally:
                if timer.active():
                    timer.cancel()
                self._return_worker(worker)
                self.warm_up()
        finally:
            self._slots.release()

    def _kill_used_workers(self, failed: _Worker) -> None:
        """Kills the workers that have done a job.

        The cause may have been a lack of memory: a retry gets a worker whose heap no job has used.
        """
        for worker in (failed, *self._idle):
            if worker.jobs:
                worker.kill()

    def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.expiry is not None and worker.expiry.active():
                worker.expiry.cancel()
            if not worker.killed and not worker.has_ended():
                return worker
        return self._spawned()

    def _spawned(self) -> _Worker:
        worker = _Worker(self._forget)
        # The child gets an environment without the secrets that the server's own may hold.
        keep = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        command = [*self._command, str(self._memory), str(self._niceness)]
        try:
            self._process.spawnProcess(worker, command[0], command, env=environment)
        except OSError as error:
            raise WorkerFailed(f"it cannot be started: {error.strerror}") from error
        self._all.add(worker)
        return worker

    def _return_worker(self, worker: _Worker) -> None:
        if worker.killed or worker.gone.happened:
            return
        if self._closed or worker.jobs >= JOBS_PER_WORKER:
            worker.kill()
            return
        self._idle.append(worker)
        worker.expiry = self._time.callLater(IDLE_SECONDS, self._expire, worker)

    def _expire(self, worker: _Worker) -> None:
        if worker in self._idle:
            self._idle.remove(worker)
            worker.kill()
            self.warm_up()

    def _forget(self, worker: _Worker) -> None:
        self._all.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    async def close(self) -> None:
        """Kills every worker and waits until all have ended."""
        self._closed = True
        workers = list(self._all)
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.gone.wait()
