"""The loops of ``obdelta worker``: each is a thread that takes jobs from the queue, one at a time.

RQ's own worker forks a process for each job. Here the reactor builds, with its caches and its
warm worker processes, and the thread only reports to Redis that the job is alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final, Protocol

import redis
from rq import Queue, worker_registration
from rq.exceptions import DeserializationError, InvalidJobOperation, StopRequested
from rq.executions import Execution
from rq.job import JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.timeouts import BaseDeathPenalty
from rq.utils import now
from rq.worker import BaseWorker, WorkerStatus
from twisted.logger import Logger

from obdelta.builds.replicas.redis_connection import why
from obdelta.builds.workers.build_job import BuildJob, StartedJobs
from obdelta.builds.workers.job_queue import JobQueue

log = Logger()

HEARTBEAT_SECONDS = 20
"""Seconds without a sign of life after which a job is given to another worker."""
BEAT_EVERY = 5
"""Seconds between two signs of life, and between two searches for jobs of dead workers."""
TICK_SECONDS = 0.5
"""Seconds between two reports of a build's progress."""
RETRY_SECONDS = 1.0
"""Seconds between two attempts to reach Redis, or to find other jobs than those of another version.
"""
OWN_FAULTS: Final = frozenset({"StoreFull", "StoreFailed", "ProgramUnusable"})
"""Errors (:mod:`obdelta.builds.workers.build_requests`) that another worker may not have. It gets
the job, as often as after a worker's death.
"""
PAUSE_SECONDS = 10.0
"""Seconds for which a worker takes no job after such an error. It would fail all of them."""
ORPHANED = timedelta(minutes=10)
"""The time after which a job that no worker's version fits is removed. A frontend that still waits
for it enqueues it again.
"""
_WORKER_TTL = 17
"""RQ waits 15 seconds less than this for a job, before it looks whether it should stop."""


class Call(Protocol):
    """A build that was started for a job. Its methods may be called in any thread."""

    def progress(self) -> Mapping[str, object]:
        """Returns how far the build is."""

    def cancel(self) -> None:
        """Ends it."""


Outcome = Mapping[str, Any] | None
"""A result for Redis; None if the worker stops, and another one must do the job."""
Start = Callable[[object, float, str, Callable[[Outcome], None]], Call]
"""Starts a build in the reactor: the request, the seconds that the job waited, the name of the
queue that it came from, and what receives its outcome.
"""


class _Unable(Exception):
    """Raised if this worker cannot build a job now. RQ queues the job again."""


class _NoLimit(BaseDeathPenalty):
    """No limit of RQ's own: builds have theirs, and a thread cannot be interrupted."""

    def setup_death_penalty(self) -> None:
        """Does nothing."""

    def cancel_death_penalty(self) -> None:
        """Does nothing."""


class JobLoop(BaseWorker):
    """One slot of a worker. :meth:`serve` runs in a thread of its own."""

    job_class = BuildJob
    death_penalty_class = _NoLimit
    log_result_lifespan = False
    exponential_backoff_factor = 1.0

    def __init__(
        self,
        jobs: JobQueue,
        worker: str,
        client: redis.Redis,
        start: Start,
        is_free: Callable[[], bool],
    ) -> None:
        """``is_free`` returns whether this worker can begin a build now."""
        queues = [jobs.own(worker), jobs.devices, jobs.prepared]
        super().__init__(
            queues,
            connection=client,
            worker_ttl=_WORKER_TTL,
            job_monitoring_interval=BEAT_EVERY,
            maintenance_interval=BEAT_EVERY,
            job_class=BuildJob,
            serializer=queues[0].serializer,
            log_job_description=False,
        )
        self._start, self._jobs, self._is_free = start, jobs, is_free
        self._passed_on: set[str] = set()
        self._unable = False
        self._ended = threading.Event()

    def stop(self) -> None:
        """Takes no more jobs. A running job continues."""
        self._stop_requested = True
        self._ended.set()

    # -- what RQ calls

    def _install_signal_handlers(self) -> None:
        """Does nothing: signals are the reactor's."""

    def subscribe(self) -> None:
        """Does nothing: a command in Redis could end the process."""

    def unsubscribe(self) -> None:
        """Does nothing."""

    def procline(self, message: str) -> None:
        """Does nothing: the process does more than RQ knows."""

    def clean_registries(self) -> None:
        """Gives jobs of dead workers to others, and forgets jobs that ended long ago."""
        for each in self.queues:
            # RQ's own lock would stay for 15 minutes after a worker that dies here.
            if self.connection.set(each.registry_cleaning_key, 1, nx=True, ex=BEAT_EVERY):
                for kind in (StartedJobs, FinishedJobRegistry, FailedJobRegistry):
                    kind(
                        each.name,
                        connection=self.connection,
                        job_class=BuildJob,
                        serializer=each.serializer,
                    ).cleanup()
                worker_registration.clean_worker_registry(each)
        self.last_cleaned_at = now()  # type: ignore[assignment] # RQ says None

    def clean_group_registries(self) -> None:
        """Does nothing: there are no groups."""

    def get_heartbeat_ttl(self, job: object, working_time: float = 0.0) -> int:
        """Returns the seconds until a job without a sign of life counts as abandoned."""
        return HEARTBEAT_SECONDS

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Reports that the worker is alive. Raises StopRequested when it is idle and stops."""
        if self._stop_requested and not self.executions:
            raise StopRequested
        super().heartbeat(timeout, pipeline)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> Any:
        """Waits until this worker is free, and then for a job: until then others get the jobs."""
        while not self._is_free():
            self.heartbeat()
            self._ended.wait(TICK_SECONDS)
        return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)

    def execute_job(self, job: Any, queue: Queue) -> None:
        """Runs a job, and waits for its end."""
        if self._stop_requested:
            queue.push_job_id(job.id, at_front=True)
            return
        if _version(job) != self._jobs.version:
            self._pass_on(job)
            return
        self._passed_on.clear()
        # Each worker looks after the jobs of this queue. No worker would after those of another
        # one's own queue, once that one is gone.
        kept = self._jobs.prepared if queue.name == self._jobs.prepared.name else self._jobs.devices
        job.origin = kept.name
        self.connection.hset(job.key, "origin", kept.name)
        execution = self.prepare_execution(job)
        job.build = lambda: self._build(job, queue.name, execution)
        self.perform_job(job, kept, execution)
        self.set_state(WorkerStatus.IDLE)
        if self._unable:
            self._unable = False
            self._ended.wait(PAUSE_SECONDS)

    def _pass_on(self, job: Any) -> None:
        """Leaves a job to workers of its frontend's version, as the last one of the queue."""
        if job.enqueued_at is None or now() - job.enqueued_at > ORPHANED:
            job.delete()
        else:
            self._jobs.pass_on(job.id, job.origin)
        if job.id in self._passed_on:
            self._passed_on.clear()
            self._ended.wait(RETRY_SECONDS)
        else:
            self._passed_on.add(job.id)

    # -- a job

    def _build(self, job: BuildJob, taken_from: str, execution: Execution) -> Mapping[str, Any]:
        """Returns the result. Raises StopRequested if another worker must do the job."""
        ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        waited = (now() - job.enqueued_at).total_seconds() if job.enqueued_at else 0.0
        waited = max(0.0, waited)  # by two machines' clocks
        call = self._start(job.args[0] if job.args else None, waited, taken_from, ended.put)
        ticks = 0
        while True:
            try:
                outcome = ended.get(timeout=TICK_SECONDS)
            except queue.Empty:
                ticks += 1
                self._report(job, execution, call, beat=ticks % int(BEAT_EVERY / TICK_SECONDS) == 0)
                continue
            if outcome is None:
                # The job's number of retries is for workers that die.
                job.retries_left = (job.retries_left or 0) + 1
                raise StopRequested
            if outcome.get("error") in OWN_FAULTS and job.retries_left:
                self._unable = True
                raise _Unable(outcome.get("reason"))
            return outcome

    def _report(self, job: BuildJob, execution: Execution, call: Call, *, beat: bool) -> None:
        """Reports progress, and ends a build whose job was cancelled. Redis may be unavailable."""
        try:
            if job.get_status(refresh=True) == JobStatus.CANCELED:
                call.cancel()
            progress = dict(call.progress())
            if progress != job.meta:
                job.meta = progress
                job.save_meta()  # type: ignore[no-untyped-call] # RQ's
            if beat:
                self.maintain_heartbeats(job, execution)
        except (InvalidJobOperation, ValueError):
            pass  # Redis was restarted, and has forgotten the job: its frontend enqueues it again
        except redis.RedisError as error:
            log.debug("Redis is unavailable: {why}: the build goes on", why=type(error).__name__)


def _version(job: Any) -> object:
    """Returns the version that a job is for, None if it has none that can be read."""
    try:
        return job.args[1]
    except (DeserializationError, LookupError, TypeError, ValueError):
        return None


class JobLoops:
    """The loops of one worker, each with a thread, and its signs of life."""

    def __init__(
        self,
        make_client: Callable[[], redis.Redis],
        make_queue: Callable[[redis.Redis], JobQueue],
        worker: str,
        slots: int,
        start: Start,
        is_free: Callable[[int], bool],
    ) -> None:
        """``make_client`` returns a new client of Redis for each thread. ``is_free`` returns
        whether fewer builds than so many are under way.
        """
        self._make_client, self._make_queue = make_client, make_queue
        self._worker, self._slots, self._start = worker, slots, start
        self._is_free = is_free
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._loops: list[JobLoop] = []
        self.problem: str | None = None
        """Why Redis is unavailable, one line; None if the last sign of life was taken."""

    @property
    def stopping(self) -> bool:
        """Whether no further job is taken."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Takes no further job."""
        with self._lock:
            self._stopping.set()
            for loop in self._loops:
                loop.stop()

    def serve(self) -> None:
        """Takes jobs until :meth:`stop`. Runs in a thread; call it once for each slot."""
        client = self._make_client()
        jobs = self._make_queue(client)
        while not self._stopping.is_set():
            loop = None
            try:
                loop = JobLoop(
                    jobs, self._worker, client, self._start, lambda: self._is_free(self._slots)
                )
                with self._lock:
                    if self._stopping.is_set():
                        break
                    self._loops.append(loop)
                loop.work(logging_level="CRITICAL")
            except redis.RedisError as error:
                log.debug("Redis is unavailable: {why}", why=type(error).__name__)
            except Exception:
                # The thread must not end: nothing would take its slot's jobs.
                log.failure("taking jobs met an unexpected error")
            finally:
                with self._lock:
                    if loop in self._loops:
                        self._loops.remove(loop)
            self._stopping.wait(RETRY_SECONDS)
        client.close()

    def report_alive(self) -> None:
        """Reports signs of life until :meth:`stop`. Runs in a thread."""
        client = self._make_client()
        jobs = self._make_queue(client)
        while not self._stopping.is_set():
            try:
                jobs.report_alive(self._worker, self._slots)
                if self.problem is not None:
                    log.info("Redis answers again")
                self.problem = None
            except redis.RedisError as error:
                if self.problem is None:
                    log.warn(
                        "Redis is unavailable: {why}: jobs are taken when it answers",
                        why=why(error),
                    )
                self.problem = why(error)
            self._stopping.wait(BEAT_EVERY)
        try:
            jobs.report_gone(self._worker, self._slots)
        except redis.RedisError as error:
            log.debug("Redis is unavailable: {why}", why=type(error).__name__)
        client.close()
