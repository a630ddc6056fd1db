"""The delta service: resolves a pair, answers from the store, and starts or joins its one build.

A client that leaves ends its own wait, never the shared build.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.failures import Attempts
from obdelta.builds.inputs.image_lookup import ImageLookup, ResolvedImage
from obdelta.builds.queue import Entry, FairQueue, Owner, Priority, Release
from obdelta.builds.rebuild import Rebuild, Rebuilder
from obdelta.builds.replicas.turns import Alone, Replicas, Turn
from obdelta.builds.types import Builder, DeltaTooLarge, Grows, Pair, Report, Takes
from obdelta.builds.verdicts import CATEGORY, Advice, FailedElsewhere, verdict_of
from obdelta.concurrency.limits import Limit
from obdelta.errors import (
    BadRequest,
    BlobUnknown,
    Broken,
    Cancelled,
    Denied,
    DigestMismatch,
    Missing,
    ObdeltaError,
    ProgramUnusable,
    ProofFailed,
    QueueFull,
    SizeMismatch,
    StillBuilding,
    StoreFailed,
    StoreFull,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UpstreamUnavailable,
    WorkerFailed,
    WorkTooLong,
)
from obdelta.observability.request_id import begin, current, make
from obdelta.oci import Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.pending_builds import QueuedBuild
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, FailureRow, Kind, Outcome
from obdelta.store.file_writer import ExternalFile
from obdelta.store.fleets import Fleets

__all__ = [
    "Answer",
    "Builder",
    "DeltaService",
    "DeltaTooLarge",
    "FullPull",
    "Growing",
    "Grows",
    "Pair",
    "Published",
    "Publisher",
    "Ready",
    "Report",
    "Takes",
]

log = Logger()

FAILURES_UNTIL_FULL_PULL = 3
TOO_LARGE_MEMORY = 86400
"""Seconds that a verdict on the contents is remembered: then another recipe or setting ``worth``
gets its turn.
"""
AGAIN_SECONDS = 60.0
"""Seconds for the upstream to confirm that both images of a delta to rebuild exist."""
MOST_STARTS = 2
"""Number of process starts after which a queued build that never ended is dropped: it may be what
ends them.
"""
RESUMED = "resumed"
"""The subject of builds that are resumed after a restart."""
_PERSONAL = (Unauthorized, Denied, Missing, UpstreamUnavailable, DigestMismatch, SizeMismatch)
"""Errors of a build that may not apply to other repositories with the same contents, or to other
credentials.
"""


@dataclass(frozen=True, slots=True)
class Ready:
    """A proven delta, visible in the pair's own repositories (the row may have been made for
    others).
    """

    pair: Pair
    delta: DeltaRow


@dataclass(frozen=True, slots=True)
class FullPull:
    """There is no delta for this pair, and there will be none for a while: the device should pull
    the target in full.

    ``category``: the name in the counters ``full_pull.*``. ``full_bytes``: see
    :attr:`~obdelta.builds.types.Pair.full_bytes`, None where one of the images is not known.
    """

    reason: str
    category: str = field(default="", compare=False)
    full_bytes: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Growing:
    """A delta that is being written, for a client that reads it meanwhile."""

    pair: Pair
    file: ExternalFile


@dataclass(frozen=True, slots=True)
class Published:
    """A delta in the registry itself, under ``name``; sizes as in
    :class:`~obdelta.store.catalogue.records.DeltaRow`.
    """

    pair: Pair
    name: Reference
    full_bytes: int
    delta_bytes: int


Answer = Ready | FullPull | Growing | Published


class Publisher(Protocol):
    """A destination of finished v3 deltas besides the store (setting ``publish``)."""

    async def find(self, pair: Pair) -> Published | None:
        """Returns the pair's delta where it is there already; never raises an ObdeltaError."""

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        """Starts to publish a new delta; waits for nothing."""

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Published | None:
        """Returns the published delta; None where that failed, and the delta is served from the
        store.

        Raises StillBuilding at ``deadline``.
        """


@dataclass(slots=True, eq=False)
class RunningBuild:
    """A build that is queued or under way. ``since`` is by the service's clock, ``asked_at`` the
    time of day.
    """

    pair: Pair
    since: float
    give_back: Callable[[], None]
    credentials: Credentials
    waiters: list[Deferred[DeltaRow]] = field(default_factory=list)
    early: list[Deferred[ExternalFile | None]] = field(default_factory=list)
    growing: ExternalFile | None = None
    progress: Mapping[str, object] = field(default_factory=dict)
    started: float | None = None
    task: Deferred[None] | None = None
    entry: Entry | None = None
    """Its entry in the queue."""
    low_memory: bool = False
    """Whether this is the second attempt, which saves memory."""
    waited: float = 0.0
    """Seconds that it has waited for other replicas."""
    request: str = field(default_factory=current)
    """The ID of the request that began it; its log lines carry this ID."""
    rebuild: Rebuild | None = None
    """Set where a known delta is rebuilt."""
    turn: Turn | None = None
    """Set where it was built here."""
    asked_at: float = field(default_factory=time.time)


async def _no_room() -> bool:
    return False


async def _admit_all() -> None:
    """Refuses no build."""


class Watcher(Protocol):
    """Receives events of builds, for metrics and pages. Its methods must be quick, and must not
    raise.
    """

    def asked(self, kind: Kind, found: str) -> None:
        """Records a request for a delta that was ``ready``, is ``building``, was ``started`` now,
        or cannot be (``refused``).
        """

    def changed(self, build: RunningBuild) -> None:
        """Records that a build was queued, was started, or made progress."""

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Records that a build has its delta, or failed.

        ``seconds`` count since it was queued; it is no longer among ``running``.
        """


class DeltaService:
    """Answers requests for pairs: found, under way, started, or refused. ``watchers`` may be added
    to.
    """

    def __init__(
        self,
        *,
        clock: IReactorTime,
        catalogue: Catalogue,
        lookup: ImageLookup,
        builders: Mapping[Kind, Builder],
        max_builds: int,
        build_seconds: float,
        failure_memory: float,
        queued: Limit | None = None,
        publisher: Publisher | None = None,
        max_queue: int = 0,
        make_room: Callable[[], Awaitable[bool]] = _no_room,
        admit: Callable[[], Awaitable[None]] = _admit_all,
        built: Callable[[], None] = lambda: None,
        rebuilder: Rebuilder | None = None,
        retire: Callable[[DeltaKey], Awaitable[object]] | None = None,
        replicas: Replicas | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``make_room`` is called when the disk is full, ``admit`` before every new build,
        ``built`` after every build.

        ``rebuilder`` rebuilds v3 deltas whose layers were evicted, and ``retire`` removes one where
        that cannot be. ``replicas``: other servers, with which builds are shared. ``now`` gives the
        time of day, for stored values.
        """
        self._replicas: Replicas = replicas or Alone()
        self._rebuilder, self._retire = rebuilder, retire
        self._publisher, self._built = publisher, built
        self._queued = queued or Limit(0, "builds of one client")
        self._clock, self._catalogue, self._lookup = clock, catalogue, lookup
        self._now = now
        self._builders, self._failure_memory = builders, failure_memory
        self._queue = FairQueue(max_builds, max_queue, clock)
        self._fleets = Fleets()
        self._attempts = Attempts(clock, build_seconds, make_room, self._catalogue.count, admit)
        self._running: dict[DeltaKey, RunningBuild] = {}
        self._closed = False
        self.watchers: list[Watcher] = []

    @property
    def running(self) -> list[RunningBuild]:
        """Queued builds and builds under way, oldest first."""
        return list(self._running.values())

    @property
    def waiting(self) -> int:
        """The number of queued builds."""
        return self._queue.waiting

    async def delta(
        self,
        kind: Kind,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        wait: float,
        client: str = "",
        *,
        early: Takes | None = None,
        priority: Priority = Priority.DEVICE,
    ) -> Answer:
        """Returns the answer for a pair within ``wait`` seconds. Raises StillBuilding if it takes
        longer (the build goes on).

        Raises permanent errors (an unknown target, refused credentials) and transient ones: those
        of the upstream, QueueFull. ``early``: the client accepts a delta that is still being
        written (Growing), where the builder offers one and this returns True for it. A new build is
        counted for ``client``. Over the limit that is QueueFull, too: any other refusal would make
        a supervisor pull in full. Cancelling ends the wait only. ``priority``: the class of a new
        build; a queued build is raised to it.
        """
        builder = self._builders[kind]
        deadline = self._clock.seconds() + wait
        try:
            resolved = await self._resolve(target, credentials, deadline)
        except Missing:
            raise
        except ObdeltaError as error:
            if verdict_of(error).advice is not Advice.FULL_PULL:
                raise
            return await self._full_pull(
                kind, f"target {error}", verdict_of(error).category, base, target
            )
        try:
            source = await self._resolve(base, credentials, deadline)
        except (Missing, BadRequest) as error:
            return await self._full_pull(kind, f"base is gone: {error}", "base-gone", base, target)
        except ObdeltaError as error:
            if verdict_of(error).advice is not Advice.FULL_PULL:
                raise
            return await self._full_pull(
                kind, f"base {error}", verdict_of(error).category, base, target
            )
        pair = Pair(kind, builder.recipe, source, resolved)
        if source.manifest.digest == resolved.manifest.digest:
            return await self._full_pull(
                kind, "base and target are the same image", "same-image", base, target
            )
        if pair.key not in self._running:
            published = (
                await self._publisher.find(pair)
                if self._publisher is not None and kind == "v3"
                else None
            )
            if published is not None:
                self._tell_asked(kind, "ready")
                return published
            row = await self._catalogue.publish_for(
                pair.key, source.repository, resolved.repository
            )
            if row is not None:
                self._tell_asked(kind, "ready")
                return await self._published(pair, row, deadline)
            failure = await self._failure(pair)
            if failure is not None:
                return await self._full_pull(
                    kind, failure.reason, CATEGORY[failure.outcome], base, target, pair
                )
        joined = self._running.get(pair.key)
        self._tell_asked(kind, "building" if joined else "started")
        if joined:
            log.debug("waits for the build that request {first} began", first=joined.request)
        build = joined or self._start(pair, builder, credentials, client, priority=priority)
        if joined:
            self._queue.join(_entry(joined), self._owner(pair, client, priority))
        try:
            if (
                early is not None
                and (growing := await self._begun(build, early, deadline)) is not None
            ):
                return Growing(pair, growing)
            try:
                row = await self._wait(build, deadline)
            except _PERSONAL as error:
                if joined is None or not _is_others(error, joined, pair, credentials):
                    raise
                # The error concerns the repositories or the credentials that the build began with:
                # retry with these.
                build = self._running.get(pair.key) or self._start(
                    pair, builder, credentials, client, priority=priority
                )
                row = await self._wait(build, deadline)
        except ProgramUnusable as error:
            return await self._full_pull(
                kind, str(error), CATEGORY[Outcome.ERROR], base, target, pair
            )
        except WorkerFailed as error:
            if await self._failure(pair) is None:
                raise
            return await self._full_pull(
                kind, str(error), CATEGORY[Outcome.ERROR], base, target, pair
            )
        except ObdeltaError as error:
            if verdict_of(error).advice is not Advice.FULL_PULL:
                raise
            reason = f"a layer is gone: {error}" if isinstance(error, Missing) else str(error)
            return await self._full_pull(
                kind, reason, verdict_of(error).category, base, target, pair
            )
        row = (
            await self._catalogue.publish_for(pair.key, source.repository, resolved.repository)
            or row
        )
        return await self._published(pair, row, deadline)

    async def _published(self, pair: Pair, row: DeltaRow, deadline: float) -> Ready | Published:
        if self._publisher is None or pair.kind != "v3":
            return Ready(pair, row)
        return await self._publisher.publish(pair, row, deadline) or Ready(pair, row)

    async def _failure(self, pair: Pair) -> FailureRow | None:
        """Returns the remembered failure that answers for a new attempt, if there is one."""
        now = int(self._now())
        failure = await self._catalogue.failure(
            pair.kind,
            pair.base.manifest.digest,
            pair.target.manifest.digest,
            now,
            TOO_LARGE_MEMORY,
            pair.repositories,
        )
        if failure is not None and failure.outcome is not Outcome.ERROR:
            return failure
        slow = await self._catalogue.slow_work.reason(pair.work, now)
        if slow is not None:
            key = pair.key
            return FailureRow(
                pair.kind, key.base, key.target, Outcome.ERROR, slow, FAILURES_UNTIL_FULL_PULL, now
            )
        if failure is None:
            return None
        fresh = failure.last > now - self._failure_memory
        return failure if fresh and failure.count >= FAILURES_UNTIL_FULL_PULL else None

    async def refuse(self, kind: Kind, base: str, target: str, why: str, category: str) -> FullPull:
        """Returns a full pull that was decided elsewhere, logged and counted like the others."""
        return await self._full_pull(kind, why, category, base, target)

    def _tell_asked(self, kind: Kind, found: str) -> None:
        for watcher in self.watchers:
            watcher.asked(kind, found)

    def _tell_changed(self, build: RunningBuild) -> None:
        for watcher in self.watchers:
            watcher.changed(build)

    async def _full_pull(
        self,
        kind: Kind,
        reason: str,
        category: str,
        base: Reference | str,
        target: Reference | str,
        pair: Pair | None = None,
    ) -> FullPull:
        self._tell_asked(kind, "refused")
        log.info(
            "full pull: kind={kind} category={category} base={base} target={target}"
            " reason={reason}",
            kind=kind,
            category=category,
            base=str(base),
            target=str(target),
            reason=reason,
        )
        await self._catalogue.count(f"full_pull.{category}")
        return FullPull(reason, category, None if pair is None else pair.full_bytes)

    async def _resolve(
        self, reference: Reference, credentials: Credentials, deadline: float
    ) -> ResolvedImage:
        answer = ensureDeferred(self._lookup.resolve(reference, credentials))
        left = max(0.0, deadline - self._clock.seconds())
        return await answer.addTimeout(left, self._clock, onTimeoutCancel=_upstream_is_slow)

    async def rebuild(self, rebuild: Rebuild, credentials: Credentials, client: str) -> Rebuild:
        """Begins to rebuild a delta whose layers were evicted, or joins its rebuild; returns the
        one whose files grow.

        The client's credentials resolve both images first. Raises as :meth:`delta` does, and
        BlobUnknown for another recipe's delta.
        """
        row, builder = rebuild.row, self._builders["v3"]
        if row.key.recipe != builder.recipe or self._rebuilder is None:
            raise BlobUnknown(row.content)
        deadline = self._clock.seconds() + AGAIN_SECONDS
        base, target = [
            await self._resolve(Reference("", repository, digest=digest), credentials, deadline)
            for repository, digest in (
                (row.base_repository, row.key.base),
                (row.target_repository, row.key.target),
            )
        ]
        running = self._running.get(row.key)
        if running is None:
            pair = Pair("v3", builder.recipe, base, target)
            running = self._start(pair, builder, credentials, client, rebuild)
        else:
            self._queue.join(_entry(running), self._owner(running.pair, client, Priority.DEVICE))
        if running.rebuild is None:
            raise StillBuilding
        return running.rebuild

    def growing(self, key: DeltaKey) -> ExternalFile | None:
        """Returns the growing file of a build under way, if it has one."""
        build = self._running.get(key)
        return None if build is None else build.growing

    async def _begun(
        self, build: RunningBuild, takes: Takes, deadline: float
    ) -> ExternalFile | None:
        """Returns a build's growing file once the client accepts it; None when the build ends
        without.
        """
        growing = build.growing
        while growing is None or growing.failure is not None or not takes(growing):
            waiter: Deferred[ExternalFile | None] = Deferred()
            build.early.append(waiter)
            left = max(0.0, deadline - self._clock.seconds())
            waiter.addTimeout(left, self._clock, onTimeoutCancel=_still_building)
            try:
                growing = await waiter
            finally:
                if waiter in build.early:
                    build.early.remove(waiter)
            if growing is None:
                return None
        return growing

    async def _wait(self, build: RunningBuild, deadline: float) -> DeltaRow:
        waiter: Deferred[DeltaRow] = Deferred()
        build.waiters.append(waiter)
        left = max(0.0, deadline - self._clock.seconds())
        waiter.addTimeout(left, self._clock, onTimeoutCancel=_still_building)
        try:
            return await waiter
        finally:
            if waiter in build.waiters:
                build.waiters.remove(waiter)

    def _owner(self, pair: Pair, client: str, priority: Priority) -> Owner:
        target = pair.target.repository
        # A token that grants nothing must not connect fleets by requesting deltas between them.
        base = target if priority is Priority.UNPRIVILEGED else pair.base.repository
        return Owner(client, self._fleets.of(base, target), priority, target)

    def _start(
        self,
        pair: Pair,
        builder: Builder,
        credentials: Credentials,
        client: str | None,
        rebuild: Rebuild | None = None,
        *,
        priority: Priority = Priority.DEVICE,
    ) -> RunningBuild:
        """``client`` None: this server's own build, resumed after a restart."""
        if self._closed:
            raise Cancelled("the server is stopping")
        try:
            give_back = self._queued.take(client) if client is not None else lambda: None
        except TooManyRequests as error:
            raise QueueFull(self._queued.most) from error
        build = RunningBuild(pair, self._clock.seconds(), give_back, credentials, rebuild=rebuild)
        try:
            owner = self._owner(pair, RESUMED if client is None else client, priority)
            build.entry = self._queue.enter(owner, admitted=client is None)
        except QueueFull:
            give_back()
            raise
        self._running[pair.key] = build
        build.task = ensureDeferred(self._run(build, builder, credentials))
        self._tell_changed(build)
        return build

    async def _run(self, build: RunningBuild, builder: Builder, credentials: Credentials) -> None:
        outcome: DeltaRow | Failure
        if not build.request:
            # A build that this server resumed itself.
            build.request = make()
            begin(build.request)
        try:
            outcome = await self._build(build, builder, credentials)
        except ObdeltaError as error:
            if build.rebuild is None:
                outcome = await self._remembered(build.pair, error)
            else:
                outcome = await self._not_again(build.pair, error)
        except CancelledError:
            outcome = Failure(Cancelled("the server is stopping"))
        except Exception:
            log.failure("build {pair} met an unexpected error", pair=str(build.pair))
            outcome = await self._remembered(
                build.pair, Unavailable("the build met an unexpected error; the log has it")
            )
        seconds = self._clock.seconds() - build.since
        if isinstance(outcome, DeltaRow):
            log.info(
                "build: pair={pair} outcome={outcome} full={full} delta={delta}"
                " seconds={seconds:.2f}",
                pair=str(build.pair),
                outcome="ready" if build.turn or build.rebuild else "elsewhere",
                full=outcome.full_bytes,
                delta=outcome.delta_bytes,
                seconds=seconds,
            )
        elif verdict_of(outcome.value).fault:
            log.warn(
                "build: pair={pair} outcome=failed seconds={seconds:.2f} reason={reason}",
                pair=str(build.pair),
                seconds=seconds,
                reason=str(outcome.value),
            )
        else:
            log.info(
                "build: pair={pair} outcome=full-pull seconds={seconds:.2f} reason={reason}",
                pair=str(build.pair),
                seconds=seconds,
                reason=str(outcome.value),
            )
        if not self._closed or isinstance(outcome, DeltaRow):
            await self._noted(build, ended=True)
        del self._running[build.pair.key]
        build.give_back()
        if build.rebuild is not None and isinstance(outcome, Failure):
            build.rebuild.failed(
                outcome.value
                if isinstance(outcome.value, Exception)
                else Cancelled("it was called off")
            )
        for watcher in self.watchers:
            watcher.ended(build, outcome, seconds)
        if build.turn is not None:
            self._replicas.over(build.turn, outcome)
        if (
            self._publisher is not None
            and isinstance(outcome, DeltaRow)
            and build.pair.kind == "v3"
        ):
            # Even where no client waits any more: the next one finds it there.
            self._publisher.begin(build.pair, outcome)
        self._built()
        _tell_all(build.early, None)
        for waiter in build.waiters[:]:
            if isinstance(outcome, DeltaRow):
                waiter.callback(outcome)
            else:
                waiter.errback(outcome)

    async def _build(
        self, build: RunningBuild, builder: Builder, credentials: Credentials
    ) -> DeltaRow:
        place = _entry(build).place
        try:
            await self._noted(build, ended=False)
        except BaseException:
            # Cancelled: its slot may have come meanwhile.
            place.addCallback(lambda release: release()).addErrback(lambda _: None)
            place.cancel()
            raise
        while True:
            release = await place
            try:
                row = await self._attempt(build, builder, credentials, release)
            finally:
                release()
            if row is not None:
                return row
            build.started, build.progress = None, {}
            self._tell_changed(build)
            # The seconds that were used count, so that a second attempt waits for its turn.
            build.entry = self._queue.enter(_entry(build).owner, admitted=build.low_memory)
            place = build.entry.place

    async def _attempt(
        self, build: RunningBuild, builder: Builder, credentials: Credentials, release: Release
    ) -> DeltaRow | None:
        """Returns None where the build needs another slot: for its second attempt, or once another
        replica has ended.
        """
        try:
            row = await self._in_its_place(build, builder, credentials)
        except (StoreFull, StoreFailed, WorkerFailed, ProofFailed) as error:
            if (
                build.low_memory
                or build.rebuild is not None
                or not await self._attempts.may_help(build.pair, error)
            ):
                raise
            build.low_memory = True
            return None
        if row is None:
            # Another replica builds it: that takes no slot here.
            release()
            began = self._clock.seconds()
            await self._replicas.wait(build.pair, build.waited)
            build.waited += self._clock.seconds() - began
        return row

    async def _in_its_place(
        self, build: RunningBuild, builder: Builder, credentials: Credentials
    ) -> DeltaRow | None:
        """Returns the delta; None while another replica builds it."""
        # A build that ended during this request has the answer already.
        row = await self._catalogue.delta(build.pair.key)
        if row is not None and build.rebuild is None:
            build.turn = build.turn or Turn(build.pair)
            return row
        if build.rebuild is None and build.turn is None:
            turn = await self._replicas.turn(build.pair, build.waited)
            if not isinstance(turn, Turn):
                return turn
            build.turn = turn
        build.started = self._clock.seconds()
        self._tell_changed(build)

        def report(progress: Mapping[str, object]) -> None:
            build.progress = progress
            self._tell_changed(build)

        def grows(file: ExternalFile) -> None:
            if build.low_memory:
                return  # readers of the first attempt were cut off: once is enough
            build.growing = file
            _tell_all(build.early, file)

        if build.rebuild is not None and self._rebuilder is not None:
            return await self._attempts.build_again(
                self._rebuilder, build.pair, credentials, report, build.rebuild
            )
        return await self._attempts.build(
            builder, build.pair, credentials, report, grows, low_memory=build.low_memory
        )

    async def _noted(self, build: RunningBuild, *, ended: bool) -> None:
        """Keeps the table of queued builds. Where it cannot be written, a restart resumes fewer
        builds.
        """
        pair = build.pair
        base, target = pair.base.manifest.digest, pair.target.manifest.digest
        try:
            if ended:
                await self._catalogue.queue.forget(pair.kind, base, target)
            else:
                await self._catalogue.queue.note(
                    QueuedBuild(
                        pair.kind,
                        pair.base.repository,
                        base,
                        pair.target.repository,
                        target,
                        int(build.asked_at),
                    )
                )
        except Unavailable as error:
            log.warn(
                "the queue's note of {pair} was not written: {reason}",
                pair=str(pair),
                reason=str(error),
            )

    async def resume(self, credentials: Credentials) -> int:
        """Resumes the builds that earlier runs had queued, with this server's own ``credentials``;
        returns their number.

        Call it at start. Where the upstream wants a device's own credentials, a build is dropped:
        the device retries anyway.
        """
        builds, poisonous = await self._catalogue.queue.take_up(MOST_STARTS)
        for _ in range(poisonous):
            await self._catalogue.count("queue.dropped")
        resumed = 0
        for queued in builds:
            try:
                await self._resume(queued, credentials)
            except Unavailable as error:
                log.warn("a queued build stays where it is: {reason}", reason=str(error))
            except ObdeltaError as error:
                log.info("a queued build was dropped: {reason}", reason=str(error))
                await self._catalogue.queue.forget(queued.kind, queued.base, queued.target)
                await self._catalogue.count("queue.dropped")
            else:
                resumed += 1
                await self._catalogue.count("queue.resumed")
        return resumed

    async def _resume(self, queued: QueuedBuild, credentials: Credentials) -> None:
        base, target = [
            await self._lookup.resolve(Reference("", repository, digest=digest), credentials)
            for repository, digest in (
                (queued.base_repository, queued.base),
                (queued.target_repository, queued.target),
            )
        ]
        builder = self._builders[queued.kind]
        pair = Pair(queued.kind, builder.recipe, base, target)
        if (
            self._publisher is not None
            and queued.kind == "v3"
            and await self._publisher.find(pair) is not None
        ):
            await self._catalogue.queue.forget(queued.kind, queued.base, queued.target)
        elif pair.key not in self._running:
            self._start(pair, builder, credentials, None, priority=Priority.PREPARED)

    async def _not_again(self, pair: Pair, error: ObdeltaError) -> Failure:
        """Retires a delta that cannot be rebuilt, so that the next client gets another answer; not
        on transient errors.
        """
        if self._retire is not None and isinstance(error, Missing | Broken | WorkerFailed):
            try:
                await self._retire(pair.key)
            except Unavailable as trouble:
                log.warn("{pair} was not retired: {reason}", pair=str(pair), reason=str(trouble))
            else:
                await self._catalogue.count("delta.retired")
        return Failure(error)

    async def _remembered(self, pair: Pair, error: ObdeltaError) -> Failure:
        """Records the failure if possible, and returns it: the waiters receive it in any case."""
        try:
            await self._remember(pair, error)
        except Exception as trouble:
            log.warn(
                "failure of {pair} was not noted: {reason}", pair=str(pair), reason=str(trouble)
            )
        return Failure(error)

    async def _remember(self, pair: Pair, error: ObdeltaError) -> None:
        outcome = verdict_of(error).outcome
        if outcome is None:
            return  # concerns the client or this server, not the pair
        if isinstance(error, FailedElsewhere):
            return  # holds as long as its key in Redis, where each new request looks
        if isinstance(error, WorkTooLong):
            await self._catalogue.slow_work.remember(pair.work, str(error), int(self._now()))
        await self._catalogue.add(f"build.{CATEGORY[outcome]}")
        await self._catalogue.remember_failure(
            pair.kind,
            pair.base.manifest.digest,
            pair.target.manifest.digest,
            outcome,
            str(error),
            int(self._now()),
            TOO_LARGE_MEMORY if outcome is not Outcome.ERROR else int(self._failure_memory),
            # A worker that failed has had its second attempt, and a build that ran out of time gets
            # none.
            times=FAILURES_UNTIL_FULL_PULL if isinstance(error, WorkerFailed) else 1,
            repositories=pair.repositories,
            recipe=pair.key.recipe,
        )

    async def drain(self, seconds: float) -> None:
        """Accepts no further build, hands back those that only wait (the catalogue has them), and
        waits for the rest.
        """
        self._closed = True
        for build in self.running:
            if build.started is None and build.task is not None:
                build.task.cancel()
        deadline = self._clock.seconds() + seconds
        while self._running and (left := deadline - self._clock.seconds()) > 0:
            ended = self._end_of(next(iter(self._running.values())))
            ended.addTimeout(left, self._clock, onTimeoutCancel=_still_building)
            try:
                await ended
            except ObdeltaError as error:
                log.debug("draining: {reason}", reason=str(error))

    async def close(self) -> None:
        """Cancels every build and waits until all have ended."""
        self._closed = True
        while self._running:
            build = next(iter(self._running.values()))
            ended = self._end_of(build)
            if build.task is not None:
                build.task.cancel()
            try:
                await ended
            except ObdeltaError as error:
                log.debug("called off {pair}: {reason}", pair=str(build.pair), reason=str(error))

    def _end_of(self, build: RunningBuild) -> Deferred[DeltaRow]:
        ended: Deferred[DeltaRow] = Deferred(lambda mine: build.waiters.remove(mine))
        build.waiters.append(ended)
        return ended


def _entry(build: RunningBuild) -> Entry:
    if build.entry is None:
        raise RuntimeError("a build that runs has entered the queue")
    return build.entry


def _tell_all(waiters: list[Deferred[ExternalFile | None]], file: ExternalFile | None) -> None:
    for waiter in waiters[:]:
        waiter.callback(file)


def _is_others(
    error: ObdeltaError, build: RunningBuild, pair: Pair, credentials: Credentials
) -> bool:
    """Returns whether a build's error does not apply to a pair that waits for it, or to its
    credentials.
    """
    if build.pair.repositories != pair.repositories:
        return True
    return isinstance(error, Unauthorized | Denied) and build.credentials != credentials


def _upstream_is_slow(result: object, _timeout: float) -> ResolvedImage:
    raise UpstreamUnavailable("it did not answer in time")


def _still_building(result: object, _timeout: float) -> object:
    if isinstance(result, Failure) and result.check(CancelledError):
        raise StillBuilding
    return result
