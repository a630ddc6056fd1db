"""One build a pair, however many ask; who asks waits, and who stops waiting takes nobody's build away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.images import ImageLookup, ResolvedImage, SeveralPlatforms
from obdelta.errors import (
    BaseUnusable,
    Cancelled,
    Denied,
    Missing,
    ObdeltaError,
    ProofFailed,
    StillBuilding,
    Unauthorized,
    Unavailable,
    UpstreamUnavailable,
    WorkerFailed,
)
from obdelta.net.limits import Limit
from obdelta.oci import Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue import Catalogue
from obdelta.store.growing import GrowingFile
from obdelta.store.rows import DeltaKey, DeltaRow, FailureRow, Kind, Outcome

log = Logger()

FAILURES_UNTIL_FULL_PULL = 3
NOT_WORTH_MEMORY = 86400
"""Seconds that a verdict on the contents is remembered: another recipe or setting ``worth`` gets its turn then."""
_CATEGORY = {Outcome.NOT_WORTH: "not-worth", Outcome.PROOF_FAILED: "proof-failed", Outcome.ERROR: "build-failed"}


@dataclass(frozen=True, slots=True)
class Pair:
    """What a delta leads from and to. ``key`` names the contents for ever, whatever tags do."""

    kind: Kind
    recipe: int
    base: ResolvedImage
    target: ResolvedImage

    @property
    def key(self) -> DeltaKey:
        return DeltaKey(self.kind, self.recipe, self.base.manifest.digest, self.target.manifest.digest)

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.base.repository}@{self.base.manifest.digest.hex[:12]} -> "
            f"{self.target.repository}@{self.target.manifest.digest.hex[:12]}"
        )


@dataclass(frozen=True, slots=True)
class Ready:
    """A proven delta, visible in the pair's own repositories (the row may have been made for others)."""

    pair: Pair
    delta: DeltaRow


@dataclass(frozen=True, slots=True)
class FullPull:
    """There is no delta for this pair, and there will be none for a while: the device should pull the target in full."""

    reason: str


@dataclass(frozen=True, slots=True)
class Growing:
    """A delta that is being written, for an asker who takes it as it comes."""

    pair: Pair
    file: GrowingFile


@dataclass(frozen=True, slots=True)
class Published:
    """A delta that the registry itself has, under ``name``; ``delta`` where it was made here and is known still."""

    pair: Pair
    name: Reference
    delta: DeltaRow | None = None


Answer = Ready | FullPull | Growing | Published


class Publisher(Protocol):
    """Where finished v3 deltas go besides the store (setting ``publish``)."""

    async def find(self, pair: Pair) -> Published | None:
        """The pair's delta where it is there already; never raises an ObdeltaError."""

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        """Start to publish what was just built; waits for nothing."""

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Published | None:
        """The published delta; None: it could not be, and is served from the store. StillBuilding at ``deadline``."""


class NotWorth(ObdeltaError):
    """The delta is not enough smaller than the full download (setting ``worth``)."""

    def __init__(self, delta_bytes: int, full_bytes: int) -> None:
        self.delta_bytes, self.full_bytes = delta_bytes, full_bytes
        super().__init__(f"not worth it: the delta has {delta_bytes} bytes, the full download {full_bytes}")


Report = Callable[[Mapping[str, object]], None]
Grows = Callable[[GrowingFile], None]
"""A builder tells, once, that what it makes can be read while it is written."""


class Builder(Protocol):
    """Makes one kind of delta."""

    kind: Kind
    recipe: int

    async def build(self, pair: Pair, credentials: Credentials, report: Report, grows: Grows) -> DeltaRow:
        """Build, prove and publish; whatever it leaves behind on failure is swept by itself."""


@dataclass(slots=True, eq=False)
class RunningBuild:
    """A build that is queued or under way."""

    pair: Pair
    since: float
    give_back: Callable[[], None]
    credentials: Credentials
    waiters: list[Deferred[DeltaRow]] = field(default_factory=list)
    early: list[Deferred[GrowingFile | None]] = field(default_factory=list)
    growing: GrowingFile | None = None
    progress: Mapping[str, object] = field(default_factory=dict)
    started: float | None = None
    task: Deferred[None] | None = None


class Coordinator:
    """Answers for pairs: found, being built, to be built, or not to be had."""

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
    ) -> None:
        self._publisher = publisher
        self._queued = queued or Limit(0, "builds of one asker")
        self._clock, self._catalogue, self._lookup = clock, catalogue, lookup
        self._builders, self._failure_memory = builders, failure_memory
        self._slots, self._build_seconds = DeferredSemaphore(max_builds), build_seconds
        self._running: dict[DeltaKey, RunningBuild] = {}
        self._closed = False

    @property
    def running(self) -> list[RunningBuild]:
        """Queued builds and builds under way, oldest first."""
        return list(self._running.values())

    async def delta(
        self,
        kind: Kind,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        wait: float,
        asker: str = "",
        *,
        early: bool = False,
    ) -> Answer:
        """The answer for a pair within ``wait`` seconds; StillBuilding if it takes longer (the build goes on).

        Raises what can never work (an unknown target, refused credentials) and passing trouble of the upstream.
        ``early``: the asker takes a delta that is still being written (Growing) where the builder can give one so.
        ``asker`` is whom a new build is counted for (TooManyRequests over the limit). Cancelling ends the wait only.
        """
        builder = self._builders[kind]
        deadline = self._clock.seconds() + wait
        try:
            resolved = await self._resolve(target, credentials, deadline)
        except SeveralPlatforms as error:
            return await self._full_pull(kind, f"target {error}", "several-platforms", base, target)
        try:
            source = await self._resolve(base, credentials, deadline)
        except SeveralPlatforms as error:
            return await self._full_pull(kind, f"base {error}", "several-platforms", base, target)
        except Missing as error:
            return await self._full_pull(kind, f"base is gone: {error}", "base-gone", base, target)
        pair = Pair(kind, builder.recipe, source, resolved)
        if source.manifest.digest == resolved.manifest.digest:
            return await self._full_pull(kind, "base and target are the same image", "same-image", base, target)
        if pair.key not in self._running:
            published = await self._publisher.find(pair) if self._publisher is not None and kind == "v3" else None
            if published is not None:
                return published
            row = await self._catalogue.publish_for(pair.key, source.repository, resolved.repository)
            if row is not None:
                return await self._published(pair, row, deadline)
            failure = await self._failure(pair)
            if failure is not None:
                return await self._full_pull(kind, failure.reason, _CATEGORY[failure.outcome], base, target)
        joined = self._running.get(pair.key)
        build = joined or self._start(pair, builder, credentials, asker)
        try:
            if early and (growing := await self._begun(build, deadline)) is not None:
                return Growing(pair, growing)
            try:
                row = await self._wait(build, deadline)
            except (Unauthorized, Denied):
                if joined is None or joined.credentials == credentials:
                    raise
                # Refused were the credentials of whoever began the build: once more, with this asker's own.
                build = self._running.get(pair.key) or self._start(pair, builder, credentials, asker)
                row = await self._wait(build, deadline)
        except (NotWorth, BaseUnusable, ProofFailed) as error:
            return await self._full_pull(kind, str(error), _CATEGORY[_outcome_of(error)], base, target)
        except Missing as error:
            return await self._full_pull(kind, f"a layer is gone: {error}", "layer-gone", base, target)
        row = await self._catalogue.publish_for(pair.key, source.repository, resolved.repository) or row
        return await self._published(pair, row, deadline)

    async def _published(self, pair: Pair, row: DeltaRow, deadline: float) -> Ready | Published:
        if self._publisher is None or pair.kind != "v3":
            return Ready(pair, row)
        return await self._publisher.publish(pair, row, deadline) or Ready(pair, row)

    async def _failure(self, pair: Pair) -> FailureRow | None:
        """The remembered failure that answers for a new attempt, if there is one."""
        now = int(self._clock.seconds())
        failure = await self._catalogue.failure(
            pair.kind, pair.base.manifest.digest, pair.target.manifest.digest, now, NOT_WORTH_MEMORY
        )
        if failure is None or failure.outcome is not Outcome.ERROR:
            return failure
        fresh = failure.last > now - self._failure_memory
        return failure if fresh and failure.count >= FAILURES_UNTIL_FULL_PULL else None

    async def refuse(self, kind: Kind, base: Reference, target: Reference, why: str) -> FullPull:
        """A full pull for an asker that could not use a delta, logged and counted like the others."""
        return await self._full_pull(kind, why, "asker-cannot", base, target)

    async def _full_pull(self, kind: Kind, reason: str, category: str, base: Reference, target: Reference) -> FullPull:
        log.info(
            "full pull: kind={kind} category={category} base={base} target={target} reason={reason}",
            kind=kind, category=category, base=str(base), target=str(target), reason=reason,
        )  # fmt: skip
        try:
            await self._catalogue.add(f"full_pull.{category}")
        except Unavailable as error:
            # A full disk is no reason to keep a device from its update.
            log.warn("full_pull.{category} was not counted: {reason}", category=category, reason=str(error))
        return FullPull(reason)

    async def _resolve(self, reference: Reference, credentials: Credentials, deadline: float) -> ResolvedImage:
        answer = ensureDeferred(self._lookup.resolve(reference, credentials))
        left = max(0.0, deadline - self._clock.seconds())
        return await answer.addTimeout(left, self._clock, onTimeoutCancel=_upstream_is_slow)

    def growing(self, key: DeltaKey) -> GrowingFile | None:
        """What a build under way has to read already."""
        build = self._running.get(key)
        return None if build is None else build.growing

    async def _begun(self, build: RunningBuild, deadline: float) -> GrowingFile | None:
        """The file of a build once there is one to read; None when the build ends without."""
        if build.growing is not None:
            return build.growing
        waiter: Deferred[GrowingFile | None] = Deferred()
        build.early.append(waiter)
        left = max(0.0, deadline - self._clock.seconds())
        waiter.addTimeout(left, self._clock, onTimeoutCancel=_still_building)
        try:
            return await waiter
        finally:
            if waiter in build.early:
                build.early.remove(waiter)

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

    def _start(self, pair: Pair, builder: Builder, credentials: Credentials, asker: str) -> RunningBuild:
        if self._closed:
            raise Cancelled("the server is stopping")
        build = RunningBuild(pair, self._clock.seconds(), self._queued.take(asker), credentials)
        self._running[pair.key] = build
        build.task = ensureDeferred(self._run(build, builder, credentials))
        return build

    async def _run(self, build: RunningBuild, builder: Builder, credentials: Credentials) -> None:
        outcome: DeltaRow | Failure
        try:
            outcome = await self._build(build, builder, credentials)
        except ObdeltaError as error:
            outcome = await self._remembered(build.pair, error)
        except CancelledError:
            outcome = Failure(Cancelled("the server is stopping"))
        except Exception:
            log.failure("build {pair} met an unexpected error", pair=str(build.pair))
            outcome = await self._remembered(build.pair, WorkerFailed("an unexpected error; the log has it"))
        seconds = self._clock.seconds() - build.since
        if isinstance(outcome, DeltaRow):
            log.info(
                "build: pair={pair} outcome=ready full={full} delta={delta} seconds={seconds:.2f}",
                pair=str(build.pair), full=outcome.full_bytes, delta=outcome.delta_bytes, seconds=seconds,
            )  # fmt: skip
        else:
            log.warn(
                "build: pair={pair} outcome=failed seconds={seconds:.2f} reason={reason}",
                pair=str(build.pair), seconds=seconds, reason=str(outcome.value),
            )  # fmt: skip
        del self._running[build.pair.key]
        build.give_back()
        if self._publisher is not None and isinstance(outcome, DeltaRow) and build.pair.kind == "v3":
            # Also where nobody waits any more: the next who asks finds it there.
            self._publisher.begin(build.pair, outcome)
        _tell_all(build.early, None)
        for waiter in build.waiters[:]:
            if isinstance(outcome, DeltaRow):
                waiter.callback(outcome)
            else:
                waiter.errback(outcome)

    async def _build(self, build: RunningBuild, builder: Builder, credentials: Credentials) -> DeltaRow:
        await self._slots.acquire()
        try:
            # A build that ended while this one was being asked for has the answer already.
            row = await self._catalogue.delta(build.pair.key)
            if row is not None:
                return row
            build.started = self._clock.seconds()

            def report(progress: Mapping[str, object]) -> None:
                build.progress = progress

            def grows(file: GrowingFile) -> None:
                build.growing = file
                _tell_all(build.early, file)

            work = ensureDeferred(builder.build(build.pair, credentials, report, grows))
            return await work.addTimeout(self._build_seconds, self._clock, onTimeoutCancel=_took_too_long)
        finally:
            self._slots.release()

    async def _remembered(self, pair: Pair, error: ObdeltaError) -> Failure:
        """The failure, noted if that can be done: whoever waits is told in any case."""
        try:
            await self._remember(pair, error)
        except Exception as trouble:
            log.warn("failure of {pair} was not noted: {reason}", pair=str(pair), reason=str(trouble))
        return Failure(error)

    async def _remember(self, pair: Pair, error: ObdeltaError) -> None:
        if isinstance(error, Cancelled | Unauthorized | Denied):
            return  # says something of the asker or of us, nothing of the pair
        outcome = _outcome_of(error)
        await self._catalogue.add(f"build.{_CATEGORY[outcome]}")
        await self._catalogue.remember_failure(
            pair.kind,
            pair.base.manifest.digest,
            pair.target.manifest.digest,
            outcome,
            str(error),
            int(self._clock.seconds()),
            NOT_WORTH_MEMORY if outcome is not Outcome.ERROR else int(self._failure_memory),
        )

    async def close(self) -> None:
        """Call every build off and wait until all have ended."""
        self._closed = True
        while self._running:
            build = next(iter(self._running.values()))
            ended: Deferred[DeltaRow] = Deferred()
            build.waiters.append(ended)
            if build.task is not None:
                build.task.cancel()
            try:
                await ended
            except ObdeltaError as error:
                log.debug("called off {pair}: {reason}", pair=str(build.pair), reason=str(error))


def _tell_all(waiters: list[Deferred[GrowingFile | None]], file: GrowingFile | None) -> None:
    for waiter in waiters[:]:
        waiter.callback(file)


def _outcome_of(error: ObdeltaError) -> Outcome:
    if isinstance(error, NotWorth | BaseUnusable):
        return Outcome.NOT_WORTH
    return Outcome.PROOF_FAILED if isinstance(error, ProofFailed) else Outcome.ERROR


def _upstream_is_slow(result: object, _timeout: float) -> ResolvedImage:
    raise UpstreamUnavailable("it did not answer in time")


def _took_too_long(result: object, seconds: float) -> DeltaRow:
    raise WorkerFailed(f"the build took more than {seconds:g} seconds")


def _still_building(result: object, _timeout: float) -> object:
    if isinstance(result, Failure) and result.check(CancelledError):
        raise StillBuilding
    return result
