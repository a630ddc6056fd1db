"""Hands builds over to workers, and waits for their results.

A frontend's own queue decides the order (:mod:`obdelta.builds.queue`). Only as many builds are
handed over as keep the workers busy, so that a fleet's turn does not depend on the queue in Redis.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.builds.queue import MAX_WAITING, FairQueue, Priority
from obdelta.builds.replicas.redis_connection import why
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import BuildCancelled, Pair, Published, Ready, Report
from obdelta.builds.workers.build_requests import BuildRequest, row_of_result
from obdelta.builds.workers.job_queue import JobQueue, JobState, Load
from obdelta.concurrency.tasks import Threads
from obdelta.errors import ObdeltaError, Unavailable, WorkerFailed
from obdelta.store.catalogue.failure_records import work_key
from obdelta.store.catalogue.records import DeltaRow

log = Logger()

POLL_SECONDS = 0.1
"""Seconds between two queries for the states of all jobs that builds here wait for."""
LOAD_SECONDS = 2.0
"""Seconds between two queries for the load of the workers."""
AFFINITY_SECONDS = 2.0
"""Seconds for which a job waits for the worker that has its base, before any may take it."""
LOST_SECONDS = 10.0
"""Seconds after which a queued job is searched for in its queue."""
NO_WORKER_SECONDS = 15 * 60.0
"""Seconds without a live worker after which builds fail, so that devices pull in full. Their jobs
stay in the queue, and are done when a worker starts.
"""
_NO_WORKER = f"no worker was alive for {NO_WORKER_SECONDS / 60:g} minutes: start obdelta worker"
MIN_HANDED_OVER = 8
"""Builds that are handed over even if no worker is alive, so that autoscaling sees them."""
HANDED_OVER = 2
"""Builds that are handed over for each slot of a worker: one runs, and one is ready to."""


def base_name(pair: Pair) -> str:
    """Returns the name of a base's layers, by which the worker that has their index is found."""
    layers = [layer.digest for layer in pair.base.manifest.layers]
    return work_key("base", layers).hex[:32]


@dataclass(slots=True, eq=False)
class _Job:
    """A job for which a build of this frontend waits."""

    build: RunningBuild
    request: BuildRequest
    report: Report
    urgent: bool
    since: float
    """When it was put into the queue, by the reactor's clock."""
    checked: float
    """When it was last searched for there."""
    missed: int = 0
    """How often in a row it was not found there."""
    result: Deferred[DeltaRow] = field(default_factory=Deferred)


class Dispatcher:
    """Builds on workers."""

    def __init__(
        self,
        jobs: JobQueue,
        threads: Threads,
        clock: IReactorTime,
        find: Callable[[Pair], Awaitable[Published | Ready | None]],
    ) -> None:
        """``find`` returns a pair's delta if the registry has it."""
        self._find = find
        self._jobs, self._threads, self._clock = jobs, threads, clock
        self.queue = FairQueue(MIN_HANDED_OVER, MAX_WAITING, clock)
        """Its slots are builds that are handed over: as many as keep the workers busy."""
        self._waiting: dict[str, _Job] = {}
        self._worker_seen = clock.seconds()
        """When a worker was alive, or this server started."""
        self.load, self._measured = Load(), False
        self.problem: str | None = None
        """Why Redis is unavailable, one line; None if the last query of the load, which also
        writes, was answered.
        """
        self._polling = self._every(POLL_SECONDS, self._poll)
        self._measuring = self._every(LOAD_SECONDS, self._measure)

    def _every(self, seconds: float, work: Callable[[], Deferred[None]]) -> LoopingCall:
        call = LoopingCall(work)
        call.clock = self._clock
        call.start(seconds, now=False)
        return call

    async def build(self, build: RunningBuild, report: Report) -> DeltaRow:
        """Has a worker build a pair, and returns the delta, which is in the registry then.

        Raises the worker's error. Cancelling ends the wait; the job is cancelled, too, if an
        operator has ended the build.
        """
        request = BuildRequest.of(build.pair)
        now = self._clock.seconds()
        urgent = build.entry.owner.priority is Priority.DEVICE
        job = _Job(build, request, report, urgent, now, now)
        self._waiting[request.name] = job
        try:
            report({"stage": "waits for a worker"})
            await self._put(job)
            return await self._proven(build.pair, await job.result)
        finally:
            if self._waiting.get(request.name) is job:
                del self._waiting[request.name]
            if build.cancelled is not None:
                self._cancel(request.name)

    async def _proven(self, pair: Pair, row: DeltaRow) -> DeltaRow:
        """Returns a worker's delta as the registry has it. Raises Unavailable if it has none:
        Redis proves nothing, as other programs may write there.
        """
        found = await self._find(pair.in_form(row.key.form))
        if found is None:
            raise Unavailable(
                "a worker reports a delta that the registry does not have: the next request builds"
                " it again"
            )
        if isinstance(found, Ready):
            return replace(found.delta, seconds=row.seconds)
        return replace(
            row,
            base_repository=pair.base.repository,
            target_repository=pair.target.repository,
            tag=found.name.tag,
            full_bytes=found.full_bytes,
            delta_bytes=found.delta_bytes,
        )

    async def _put(self, job: _Job) -> None:
        """Enqueues a job. Where Redis is unavailable, the next poll does."""
        job.since = job.checked = self._clock.seconds()
        job.missed = 0
        await self._ask(
            lambda: self._jobs.put(
                job.request.name,
                job.request.as_json(),
                base_name(job.build.pair),
                urgent=job.urgent,
            )
        )

    def _cancel(self, name: str) -> None:
        ensureDeferred(self._ask(lambda: self._jobs.cancel(name)))

    async def _ask(self, query: Callable[[], object]) -> bool:
        """Runs a query in a thread. Returns whether Redis has answered it."""
        try:
            await self._threads.run(query)
        # Any exception: on invalid answers redis-py and RQ raise more than their own errors, and
        # the poll must go on.
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        if self.problem is None:
            log.warn(
                "builds are not handed over to workers: Redis is unavailable: {why}: they wait",
                why=why(error),
            )
        self.problem = why(error)

    # -- states

    def _poll(self) -> Deferred[None]:
        return ensureDeferred(self._look())

    async def _look(self) -> None:
        waiting = dict(self._waiting)
        if not waiting:
            return
        if self._clock.seconds() - self._worker_seen > NO_WORKER_SECONDS:
            for name, job in waiting.items():
                self._fail(name, job, WorkerFailed(_NO_WORKER))
            return
        found: dict[str, tuple[JobState | None, str]] = {}
        if not await self._ask(lambda: found.update(self._jobs.states(list(waiting)))):
            return
        for name, job in waiting.items():
            if self._waiting.get(name) is job:
                await self._follow(name, job, *found[name])

    async def _follow(self, name: str, job: _Job, state: JobState | None, queue: str) -> None:
        if state is None:
            # Redis has lost it, or could not take it.
            await self._put(job)
        elif state.status == "finished":
            self._end(name, job, state.result)
        elif state.status == "queued":
            await self._follow_queued(name, job, queue)
        elif state.status == "started":
            if job.build.started is None:
                job.build.started = self._clock.seconds()
            if state.progress and state.progress != job.build.progress:
                job.report(state.progress)
            await self._replace_lost(name, job, queue)
        elif state.status == "canceled":
            self._fail(name, job, BuildCancelled())  # on another frontend
        else:
            self._fail(name, job, WorkerFailed("several workers died in the build, or failed"))

    async def _follow_queued(self, name: str, job: _Job, queue: str) -> None:
        now = self._clock.seconds()
        priority = job.build.entry.owner.priority
        if priority is Priority.DEVICE and not job.urgent:
            # A device asks for what was only prepared so far.
            job.urgent = True
            await self._put(job)
        elif ":at:" in queue and now - job.since >= AFFINITY_SECONDS:
            await self._ask(lambda: self._jobs.spread(name, queue))
        else:
            await self._replace_lost(name, job, queue)

    async def _replace_lost(self, name: str, job: _Job, queue: str) -> None:
        """Enqueues a job again that no worker will end."""
        now = self._clock.seconds()
        if now - job.checked < LOST_SECONDS:
            return
        job.checked = now
        lost: list[bool] = []
        await self._ask(lambda: lost.append(self._jobs.is_lost(name, queue)))
        job.missed = job.missed + 1 if lost == [True] else 0
        if job.missed > 1:
            log.warn("no worker has {pair} any more: enqueued again", pair=str(job.build.pair))
            await self._ask(lambda: self._jobs.remove(name))
            job.build.started = None
            await self._put(job)

    def _end(self, name: str, job: _Job, result: object) -> None:
        del self._waiting[name]
        try:
            row = row_of_result(result, job.build.pair)
        except ObdeltaError as error:
            job.result.errback(error)
        else:
            job.result.callback(row)

    def _fail(self, name: str, job: _Job, error: ObdeltaError) -> None:
        del self._waiting[name]
        job.result.errback(error)

    # -- load

    def _measure(self) -> Deferred[None]:
        return ensureDeferred(self._update_load())

    async def _update_load(self) -> None:
        found: list[Load] = []
        if await self._ask(lambda: found.append(self._jobs.load())):
            self.load, self._measured = found[0], True
            if self.problem is not None:
                log.info("Redis answers again: builds are handed over to workers")
                self.problem = None
            if self.load.workers:
                self._worker_seen = self._clock.seconds()
            self.queue.resize(max(MIN_HANDED_OVER, HANDED_OVER * self.load.slots))

    def note(self) -> str:
        """Returns one line about the workers, for readiness."""
        if self.problem is not None:
            return f"workers: Redis is unavailable ({self.problem}): builds wait"
        load = self.load
        others = (
            f"; {load.others} of another version or setting publish, which take no jobs from here"
            if load.others
            else ""
        )
        if not load.workers:
            return f"workers: none is alive: builds wait{others}"
        return (
            f"workers: {load.workers} alive with {load.slots} slots;"
            f" {load.devices + load.prepared} jobs wait{others}"
        )

    def warning(self) -> str:
        """Returns the line if builds wait for workers or for Redis, else ""."""
        waits = self.problem is not None or (self._measured and not self.load.workers)
        return self.note() if waits else ""

    async def close(self) -> None:
        """Ends the queries. Jobs that were handed over go on."""
        for call in (self._polling, self._measuring):
            if call.running:
                call.stop()
