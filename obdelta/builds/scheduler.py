"""The scheduler of builds: queues them, and lets many clients wait for the same one.

Each pair has one build at a time, however many clients wait for it. A client that leaves ends its
own wait, never the shared build.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.failures import Failures
from obdelta.builds.queue import FairQueue, Owner, Priority
from obdelta.builds.rebuild import Rebuild
from obdelta.builds.running_build import Attempts, RunningBuild, log_end, log_unrecorded
from obdelta.builds.types import (
    AcceptsFile,
    Builder,
    Pair,
    Publisher,
    Replicas,
    Space,
    Watcher,
    Workers,
)
from obdelta.concurrency.limits import Limit, in_time
from obdelta.concurrency.tasks import Task
from obdelta.errors import (
    Broken,
    Cancelled,
    Missing,
    ObdeltaError,
    QueueFull,
    StillBuilding,
    TooManyRequests,
    Unavailable,
    WorkerFailed,
)
from obdelta.observability.logging import begin_request, new_request_id
from obdelta.oci import Digest, ImageNames
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from obdelta.store.file_writer import ExternalFile
from obdelta.store.fleets import Fleets

log = Logger()

MAX_STARTS = 2
"""Starts after which a queued build that never ended is dropped: it may crash the process."""
OWN = "server"
"""The subject of builds that no client began: those resumed after a restart, and other forms."""


class Scheduler:
    """Runs builds. ``watchers`` may be added to."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        catalogue: Catalogue,
        failures: Failures,
        queue: FairQueue,
        limit: Limit,
        build_seconds: float,
        space: Space,
        publishers: Mapping[Kind, Publisher] | None = None,
        retire: Callable[[DeltaKey], Awaitable[object]] | None = None,
        replicas: Replicas | None = None,
        workers: Workers | None = None,
    ) -> None:
        """``queue`` has the slots of builds here. ``limit`` bounds the builds of one client.
        ``build_seconds``: the time of one attempt. ``publishers`` receive finished deltas.
        ``retire`` removes one that cannot be rebuilt. ``replicas``: servers that share builds.
        ``workers``: machines that build. Rebuilds of evicted layers stay here even with them.
        """
        self._clock, self._catalogue, self._failures = clock, catalogue, failures
        self._queue, self._limit, self._space = queue, limit, space
        self._publishers, self._retire = publishers or {}, retire
        self._attempts = Attempts(
            clock=clock,
            catalogue=catalogue,
            seconds=build_seconds,
            space=space,
            replicas=replicas,
            report_change=self._report_change,
            workers=workers,
        )
        self._workers, self._fleets = workers, Fleets()
        self._running: dict[DeltaKey, RunningBuild] = {}
        self._closed = False
        self.watchers: list[Watcher] = []

    @property
    def running(self) -> list[RunningBuild]:
        """Queued builds and builds under way, oldest first."""
        return list(self._running.values())

    @property
    def queued(self) -> int:
        """The number of queued builds."""
        return self._queue.waiting + (0 if self._workers is None else self._workers.queue.waiting)

    def find(self, key: DeltaKey) -> RunningBuild | None:
        """Returns the build of a delta that is queued or under way."""
        return self._running.get(key)

    # -- clients

    def start(
        self,
        pair: Pair,
        builder: Builder,
        credentials: Credentials,
        client: str | None,
        rebuild: Rebuild | None = None,
        *,
        priority: Priority = Priority.DEVICE,
        admitted: bool = False,
    ) -> RunningBuild:
        """Queues a build of a pair that has none. Raises QueueFull, Cancelled.

        ``client`` None: this server's own build. ``admitted``: it was queued before a restart.
        """
        if self._closed:
            raise Cancelled("the server is stopping")
        try:
            release = self._limit.take(client) if client is not None else lambda: None
        except TooManyRequests as error:
            raise QueueFull(self._limit.most) from error
        workers = self._workers if rebuild is None else None
        queue = self._queue if workers is None else workers.queue
        try:
            owner = self._owner(pair, OWN if client is None else client, priority)
            entry = queue.enter(owner, admitted=admitted)
        except QueueFull:
            release()
            raise
        build = RunningBuild(
            pair,
            self._clock.seconds(),
            credentials,
            release,
            queue,
            entry,
            rebuild=rebuild,
            handed_over=workers is not None,
        )
        self._running.setdefault(pair.key, build)
        build.task = Task(self._finish(build, self._attempts.run(build, builder)))
        self._report_change(build)
        return build

    def join(self, build: RunningBuild, pair: Pair, client: str, priority: Priority) -> None:
        """Counts another client of a build: the build gets the better standing of the two."""
        build.queue.join(build.entry, self._owner(pair, client, priority))

    async def forget(self, pair: Pair) -> None:
        """Forgets how a pair failed, here and at other replicas."""
        await self._failures.forget(pair)
        await self._attempts.replicas.forget(pair)

    async def wait(self, build: RunningBuild, deadline: float) -> DeltaRow:
        """Returns the delta of a build. Raises the build's error, StillBuilding at ``deadline``."""
        if build.task is None:
            raise AssertionError("a build has its task once it was started")
        left = deadline - self._clock.seconds()
        return await in_time(ensureDeferred(build.task.result()), left, self._clock, StillBuilding)

    async def growing_file(
        self, build: RunningBuild, accepts: AcceptsFile, deadline: float
    ) -> ExternalFile | None:
        """Returns a build's growing file once the client accepts it; None when the build ends
        without. Raises StillBuilding at ``deadline``.
        """
        file = build.growing
        while file is None or file.failure is not None or not accepts(file):
            left = deadline - self._clock.seconds()
            file = await in_time(build.growth.wait(), left, self._clock, StillBuilding)
            if file is None:
                return None
        return file

    def _owner(self, pair: Pair, client: str, priority: Priority) -> Owner:
        target = pair.target.repository
        # A token that grants nothing must not connect fleets by requesting deltas between them.
        base = target if priority is Priority.UNPRIVILEGED else pair.base.repository
        return Owner(client, self._fleets.of(base, target), priority, target)

    def _report_change(self, build: RunningBuild) -> None:
        for watcher in self.watchers:
            watcher.changed(build)

    # -- its end

    async def _finish(
        self, build: RunningBuild, work: Coroutine[Deferred[Any], Any, DeltaRow]
    ) -> DeltaRow:
        """Waits for the work of a build, and reports its end everywhere. Raises its error."""
        if not build.request:
            # A build that this server resumed itself.
            build.request = new_request_id()
            begin_request(build.request)
        try:
            outcome = await self._outcome(build, work)
            seconds = self._clock.seconds() - build.since
            if not self._closed or isinstance(outcome, DeltaRow):
                await self._store_ended(build)
            log_end(build, outcome, seconds, await self._names(build.pair))
        finally:
            # Also after an unexpected error: `close` and later clients wait for what is left here.
            if self._running.get(build.pair.key) is build:
                del self._running[build.pair.key]
            build.release()
        if build.rebuild is not None and isinstance(outcome, Failure):
            build.rebuild.failed(
                outcome.value
                if isinstance(outcome.value, Exception)
                else Cancelled("it was cancelled")
            )
        for watcher in self.watchers:
            watcher.ended(build, outcome, seconds)
        if build.turn is not None:
            self._attempts.replicas.report_end(build.turn, outcome)
        publisher = self._publishers.get(build.pair.kind)
        if publisher is not None and isinstance(outcome, DeltaRow):
            # Even if no client waits any more: the next one finds it there.
            publisher.begin(build.pair.in_form(outcome.key.form), outcome)
        self._space.grew()
        build.growth.fire(None)
        if isinstance(outcome, Failure):
            outcome.raiseException()
        return outcome

    async def _outcome(
        self, build: RunningBuild, work: Coroutine[Deferred[Any], Any, DeltaRow]
    ) -> DeltaRow | Failure:
        try:
            return await work
        except ObdeltaError as error:
            if build.rebuild is None:
                await self._failures.record(build.pair, error)
            elif isinstance(error, Missing | Broken | WorkerFailed):
                await self._remove(build.pair)
            return Failure(error)
        except CancelledError:
            if build.cancelled is None:
                return Failure(Cancelled("the server is stopping"))
            if build.rebuild is None:
                await self._failures.record(build.pair, build.cancelled)
            return Failure(build.cancelled)
        except Exception:
            log.failure("build {pair} met an unexpected error", pair=str(build.pair))
            unexpected = Unavailable("an unexpected error ended the build: see the log")
            await self._failures.record(build.pair, unexpected)
            return Failure(unexpected)

    async def _names(self, pair: Pair) -> Mapping[Digest, ImageNames]:
        """Returns what the images of a pair call themselves; nothing if that cannot be read now."""
        images = [pair.base.manifest.digest, pair.target.manifest.digest]
        try:
            return await self._catalogue.named_images.of(images)
        except (Unavailable, CancelledError):
            return {}

    async def _remove(self, pair: Pair) -> None:
        """Removes a delta that cannot be rebuilt, so that the next client gets another answer."""
        if self._retire is None:
            return
        try:
            await self._retire(pair.key)
        except (Unavailable, CancelledError) as error:
            log.warn("{pair} was not retired: {reason}", pair=str(pair), reason=str(error))
        else:
            await self._catalogue.counters.count("delta.retired")

    async def _store_ended(self, build: RunningBuild) -> None:
        try:
            await self._catalogue.pending_builds.forget(build.pending)
        except Exception as error:  # whatever it is, clients receive the build's own outcome
            log_unrecorded(build.pair, error)

    # -- start and end of the server

    async def resume(
        self,
        find_pair: Callable[[PendingBuild], Awaitable[tuple[Pair, Builder]]],
        credentials: Credentials,
    ) -> int:
        """Queues the builds that earlier runs had queued; returns their number. ``find_pair``
        resolves their images.
        """
        builds, dropped = await self._catalogue.pending_builds.take_all(MAX_STARTS)
        for _ in range(dropped):
            await self._catalogue.counters.count("queue.dropped")
        resumed = 0
        for queued in builds:
            try:
                await self._resume(queued, *await find_pair(queued), credentials)
            except Unavailable as error:
                log.warn(
                    "a queued build was not resumed: {reason}: the next start may resume it",
                    reason=str(error),
                )
            except ObdeltaError as error:
                log.info("a queued build was dropped: {reason}", reason=str(error))
                await self._catalogue.pending_builds.forget(queued)
                await self._catalogue.counters.count("queue.dropped")
            else:
                resumed += 1
                await self._catalogue.counters.count("queue.resumed")
        return resumed

    async def _resume(
        self, queued: PendingBuild, pair: Pair, builder: Builder, credentials: Credentials
    ) -> None:
        publisher = self._publishers.get(pair.kind)
        if publisher is not None and await publisher.find(pair) is not None:
            await self._catalogue.pending_builds.forget(queued)
        elif pair.key not in self._running:
            self.start(pair, builder, credentials, None, priority=Priority.PREPARED, admitted=True)

    async def drain(self, seconds: float) -> None:
        """Accepts no further build, ends those that only wait (the next start resumes them), and
        waits for the rest.
        """
        self._closed = True
        for build in self.running:
            if build.started is None and build.task is not None:
                build.task.cancel()
        deadline = self._clock.seconds() + seconds
        while self._running and self._clock.seconds() < deadline:
            try:
                await self.wait(next(iter(self._running.values())), deadline)
            except ObdeltaError as error:
                log.debug("draining: {reason}", reason=str(error))

    async def close(self) -> None:
        """Cancels every build and waits until all have ended."""
        self._closed = True
        for build in self.running:
            if build.task is not None:
                await build.task.end()
