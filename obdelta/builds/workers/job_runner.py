"""Runs the build of one job in a worker: resolves both images, builds, and pushes the delta."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.inputs.pair_resolver import PairResolver
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.builds.publish.registry_publisher import RegistryPublisher
from obdelta.builds.queue import Priority
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.types import Builder, Pair, Published, Ready
from obdelta.builds.workers.build_requests import (
    read_request,
    result_of_error,
    result_of_row,
)
from obdelta.builds.workers.dispatcher import base_name
from obdelta.builds.workers.job_loop import Outcome
from obdelta.concurrency.reactor import IReactor
from obdelta.errors import ObdeltaError, StillBuilding, Unavailable
from obdelta.registry import Credentials, Upstream
from obdelta.store.catalogue.records import DeltaRow, Kind

log = Logger()


class RunningJob:
    """A build for one job; see :class:`obdelta.builds.workers.job_loop.Call`."""

    def __init__(self, reactor: IReactor) -> None:
        self._reactor = reactor
        self.work: Deferred[Any] | None = None
        self.build: RunningBuild | None = None
        self._cancelled = threading.Event()

    def progress(self) -> Mapping[str, object]:
        """Returns how far the build is."""
        build = self.build
        return {} if build is None else build.progress

    def cancel(self) -> None:
        """Ends the build, once."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._reactor.callFromThread(self._cancel)

    def _cancel(self) -> None:
        task = None if self.build is None else self.build.task
        if self.build is not None and task is not None and not task.ended:
            ensureDeferred(self.build.cancel())
        elif self.work is not None:
            self.work.cancel()


class JobRunner:
    """Runs jobs with this worker's own credentials, whose tokens are for one repository each."""

    def __init__(
        self,
        *,
        reactor: IReactor,
        upstream: Upstream,
        pairs: PairResolver,
        builders: Mapping[Kind, Builder],
        scheduler: Scheduler,
        publishers: Mapping[Kind, RegistryPublisher | BatchPublisher],
        credentials: Credentials,
        push_seconds: float,
        report_base: Callable[[str], Awaitable[None]],
        waited: Callable[[str, float], None],
    ) -> None:
        """``report_base`` records that the base's index is here. ``waited`` receives the kind of a
        job's queue, and the seconds that it waited there.
        """
        self._reactor, self._upstream, self._pairs = reactor, upstream, pairs
        self._builders, self._scheduler, self._publishers = builders, scheduler, publishers
        self._credentials, self._push_seconds = credentials, push_seconds
        self._report_base, self._waited = report_base, waited
        self._running: set[RunningJob] = set()
        self._stopping = False

    def start(
        self, request: object, waited: float, queue: str, ended: Callable[[Outcome], None]
    ) -> RunningJob:
        """Starts a job's build; see :data:`obdelta.builds.workers.job_loop.Start`. May be called in
        any thread.
        """
        job = RunningJob(self._reactor)

        def begin() -> None:
            self._waited("own" if ":at:" in queue else queue.rpartition(":")[2], waited)
            self._running.add(job)
            job.work = ensureDeferred(self._run(job, request))
            job.work.addErrback(self._failed)
            job.work.addCallback(end)

        def end(outcome: Outcome) -> None:
            self._running.discard(job)
            ended(outcome)

        self._reactor.callFromThread(begin)
        return job

    def stop(self) -> None:
        """Ends all builds; other workers get their jobs."""
        self._stopping = True
        for job in list(self._running):
            job.cancel()

    @property
    def running(self) -> int:
        """The number of jobs under way."""
        return len(self._running)

    def is_free(self, slots: int) -> bool:
        """Returns whether fewer than ``slots`` builds are under way, including those of other forms
        of a delta, for which there is no job. May be called in any thread.
        """
        others = sum(
            build.started is not None and build.entry.owner.priority is not Priority.DEVICE
            for build in self._scheduler.running
        )
        return self.running + others < slots

    def _failed(self, failure: Failure) -> Outcome:
        error = failure.value
        if self._stopping:
            return None
        if isinstance(error, ObdeltaError):
            return result_of_error(error)
        if isinstance(error, CancelledError):
            return result_of_error(Unavailable("the build was cancelled"))
        log.failure("a job met an unexpected error", failure)
        return result_of_error(Unavailable("the build met an unexpected error; the log has it"))

    async def _run(self, job: RunningJob, found: object) -> Outcome:
        request = read_request(found)
        if request is None:
            raise Unavailable("a job cannot be read: all must run the same version")
        if request.recipe != (recipe := self._builders[request.kind].recipe):
            raise Unavailable(
                f"a job asks for recipe {request.recipe}, this worker builds {recipe}:"
                " all must run the same version"
            )
        base, target = await self._pairs.images(
            (request.base_repository, request.base),
            (request.target_repository, request.target),
            self._credentials,
        )
        pair = Pair(request.kind, request.recipe, base, target, request.form)
        # The registry may be mended, and an operator retries.
        self._publishers[pair.kind].forget_failure(pair)
        row = await self._published(pair) or await self._built(job, pair)
        return result_of_row(row)

    async def _published(self, pair: Pair) -> DeltaRow | None:
        """Returns the delta if the registry has it by now."""
        published = await self._publishers[pair.kind].find(pair)
        if isinstance(published, Ready):
            return published.delta
        if published is None or published.name.tag is None:
            return None
        manifest = await self._upstream.manifest(
            pair.target.repository, published.name.tag, self._credentials
        )
        return DeltaRow(
            pair.key,
            base_repository=pair.base.repository,
            target_repository=pair.target.repository,
            tag=published.name.tag,
            content=manifest.digest,
            full_bytes=published.full_bytes,
            delta_bytes=published.delta_bytes,
            seconds=0.0,
            created=int(time.time()),
        )

    async def _built(self, job: RunningJob, pair: Pair) -> DeltaRow:
        """Builds a delta, or joins its build, and returns it once it is in the registry."""
        deadline = self._reactor.seconds() + 2 * self._push_seconds
        await self._others(pair, deadline)
        job.build = self._scheduler.find(pair.key) or self._scheduler.start(
            pair, self._builders[pair.kind], self._credentials, None, priority=Priority.DEVICE
        )
        row = await self._scheduler.wait(job.build, deadline)
        await self._report_base(base_name(pair))
        publisher, own = self._publishers[pair.kind], pair.in_form(row.key.form)
        published: Published | Ready | None = await publisher.publish(own, row, deadline)
        if published is None:
            raise Unavailable(
                f"the delta was built, and could not be pushed: {publisher.problem(own)}"
            )
        # The first batch of a pair stays in the registry, whichever server has built it.
        return published.delta if isinstance(published, Ready) else row

    async def _others(self, pair: Pair, deadline: float) -> None:
        """Waits for builds of the same contents in other repositories. A delta that one of them has
        proven is in the store then.

        They are not joined: their owners may have caused the error, or have put the delta into the
        registry. Raises StillBuilding at ``deadline``.
        """
        while (build := self._scheduler.find(pair.key)) is not None:
            if build.pair.repositories == pair.repositories:
                return
            try:
                await self._scheduler.wait(build, deadline)
            except StillBuilding:
                raise
            except ObdeltaError as error:
                log.debug("the same contents in other repositories: {why}", why=str(error))
