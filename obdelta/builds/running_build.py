"""One build: its state, and its attempts; a dead worker process or a full disk leads to a second
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from obdelta.builds.queue import Entry, FairQueue
from obdelta.builds.rebuild import Rebuild
from obdelta.builds.types import (
    BuildCancelled,
    Builder,
    Pair,
    Replicas,
    SingleServer,
    Space,
    Turn,
    Workers,
)
from obdelta.builds.verdicts import verdict_of
from obdelta.concurrency.tasks import Task, Waiters
from obdelta.errors import (
    BuildTimedOut,
    ProgramUnusable,
    ProofFailed,
    QuotaUsedUp,
    StoreFailed,
    StoreFull,
    Unavailable,
    WorkerFailed,
)
from obdelta.observability.logging import current_request
from obdelta.oci import Digest, ImageNames
from obdelta.registry import Credentials
from obdelta.store import files
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from obdelta.store.file_writer import ExternalFile

log = Logger()


@dataclass(slots=True, eq=False)
class RunningBuild:
    """A build that is queued or under way. ``since`` and ``started`` are by the reactor's clock,
    ``requested_at`` is the time of day.
    """

    pair: Pair
    since: float
    credentials: Credentials
    release: Callable[[], None]
    """Ends its part in its client's limit."""
    queue: FairQueue
    entry: Entry
    """Its entry in ``queue``."""
    rebuild: Rebuild | None = None
    """Set if a known delta is rebuilt."""
    request: str = field(default_factory=current_request)
    """The ID of the request that began it; its log lines carry this ID."""
    requested_at: float = field(default_factory=time.time)
    started: float | None = None
    progress: Mapping[str, object] = field(default_factory=dict)
    growing: ExternalFile | None = None
    """The file that it writes, if clients can read it meanwhile."""
    growth: Waiters[ExternalFile | None] = field(default_factory=Waiters)
    """Clients that wait for news of that file. None: the build has ended."""
    low_memory: bool = False
    """Whether this is the second attempt, which saves memory."""
    handed_over: bool = False
    """Whether another machine builds it, which also makes the second attempt."""
    waited: float = 0.0
    """Seconds that it has waited for other replicas."""
    turn: Turn | None = None
    """Set once this replica is the one that builds."""
    cancelled: BuildCancelled | None = None
    """Set if an operator ends it."""
    task: Task[DeltaRow] | None = None

    @property
    def pending(self) -> PendingBuild:
        """The row by which the next start resumes this build."""
        pair = self.pair
        return PendingBuild(
            pair.kind,
            pair.base.repository,
            pair.base.manifest.digest,
            pair.target.repository,
            pair.target.manifest.digest,
            int(self.requested_at),
            pair.form,
        )

    @property
    def found_elsewhere(self) -> bool:
        """Whether the registry had its delta: this server has not proven it."""
        return self.turn is None and self.rebuild is None

    @property
    def waiting(self) -> int:
        """The number of clients that wait for its end."""
        return 0 if self.task is None else self.task.waiting

    async def cancel(self) -> None:
        """Ends the build because an operator asked for it; returns when it has ended. Its clients
        pull in full, and so do later ones while the failure is remembered.
        """
        if self.task is not None and self.cancelled is None:
            self.cancelled = BuildCancelled()
            await self.task.end()


class Attempts:
    """Runs builds in the slots of their queues. ``seconds``: the time of one attempt."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        catalogue: Catalogue,
        seconds: float,
        space: Space,
        replicas: Replicas | None,
        report_change: Callable[[RunningBuild], None],
        workers: Workers | None = None,
    ) -> None:
        """``workers``: those that build instead of this process, if any."""
        self._clock, self._catalogue, self._workers = clock, catalogue, workers
        self._seconds, self._space = seconds, space
        self.replicas: Replicas = replicas or SingleServer()
        self._report_change = report_change

    async def run(self, build: RunningBuild, builder: Builder) -> DeltaRow:
        """Waits for a slot and builds; after some failures builds a second time."""
        await self._store_queued(build)
        while True:
            release = await build.entry.place
            try:
                row = await self._known_delta(build)
                if row is not None:
                    return row
                if build.handed_over and self._workers is not None:
                    return await self._workers.build(
                        build, lambda progress: self._report_progress(build, progress)
                    )
                if build.rebuild is not None or build.turn is not None:
                    await self._admit(build)
                    return await self._limited(
                        build,
                        builder.build(
                            build.pair,
                            build.credentials,
                            lambda progress: self._report_progress(build, progress),
                            lambda file: _report_file(build, file),
                            low_memory=build.low_memory,
                        ),
                    )
                release()  # Another replica builds it: waiting for that takes no slot here.
                await self._wait_for_replica(build)
            except (StoreFull, StoreFailed, WorkerFailed, ProofFailed) as error:
                if not await self._retry_may_help(build, error):
                    raise
                build.low_memory = True
            finally:
                release()
            build.started, build.progress = None, {}
            self._report_change(build)
            # The first attempt's seconds count as its client's use, so the second one is queued.
            build.entry = build.queue.enter(build.entry.owner, admitted=build.low_memory)

    async def _store_queued(self, build: RunningBuild) -> None:
        """Records a build, so that a restart resumes it."""
        try:
            await self._catalogue.pending_builds.note(build.pending)
        except Unavailable as error:
            log_unrecorded(build.pair, error)
        except BaseException:
            # Cancelled: its slot may have come meanwhile.
            place = build.entry.place
            place.addCallback(lambda release: release()).addErrback(lambda _: None)
            place.cancel()
            raise

    async def _known_delta(self, build: RunningBuild) -> DeltaRow | None:
        """Returns the delta if there is one by now, so that no build is needed. Otherwise takes the
        turn to build, unless another replica has it.
        """
        if build.rebuild is not None:
            return None
        # A build that ended during this request has the answer already.
        row = await self._catalogue.delta(build.pair.key)
        if row is not None:
            build.turn = build.turn or Turn(build.pair)
            return row
        if not build.handed_over and build.turn is None:
            turn = await self.replicas.turn(build.pair, build.waited)
            if not isinstance(turn, Turn):
                return turn
            build.turn = turn
        return None

    async def _wait_for_replica(self, build: RunningBuild) -> None:
        began = self._clock.seconds()
        await self.replicas.wait(build.pair, build.waited)
        build.waited += self._clock.seconds() - began

    async def _admit(self, build: RunningBuild) -> None:
        build.started = self._clock.seconds()
        self._report_change(build)
        if build.rebuild is None:
            await self._space.admit()
        else:
            await self._catalogue.counters.count("delta.again")

    async def _limited(
        self, build: RunningBuild, work: Coroutine[Deferred[Any], Any, DeltaRow]
    ) -> DeltaRow:
        """Runs one attempt in its time. Errors of the file system become errors of the store."""
        try:
            return await ensureDeferred(work).addTimeout(
                self._seconds, self._clock, onTimeoutCancel=_took_too_long
            )
        except OSError as error:
            log.warn(
                "build of {pair}: the store failed: {reason}",
                pair=str(build.pair),
                reason=files.error_for_log(error),
            )
            raise files.error_for_client(error) from error

    async def _retry_may_help(
        self, build: RunningBuild, error: StoreFull | StoreFailed | WorkerFailed | ProofFailed
    ) -> bool:
        """Returns whether a second attempt with less memory may succeed. If so, counts it as a
        retry.

        A worker process that died or ran out of memory may manage with less. A proof may have
        failed because of a cached layer, and is repeated with fresh ones. A file that was removed
        during a build is rebuilt. A build that ran out of time would do so again. Devices that read
        a rebuilt layer have its bytes already, and retry by themselves.
        """
        if build.low_memory or build.handed_over or build.rebuild is not None:
            return False
        if isinstance(error, BuildTimedOut | ProgramUnusable | QuotaUsedUp):
            return False
        if isinstance(error, StoreFull) and not await self._space.make_room():
            return False
        log.warn(
            "build of {pair} failed: {reason}: it is retried once",
            pair=str(build.pair),
            reason=str(error),
        )
        await self._catalogue.counters.count("build.retried")
        return True

    def _report_progress(self, build: RunningBuild, progress: Mapping[str, object]) -> None:
        build.progress = progress
        self._report_change(build)


def _report_file(build: RunningBuild, file: ExternalFile) -> None:
    if build.low_memory:
        return  # Readers of the first attempt were cut off: once is enough.
    build.growing = file
    build.growth.fire(file)


def _took_too_long(result: object, seconds: float) -> DeltaRow:
    if isinstance(result, DeltaRow):
        return result
    raise BuildTimedOut(f"the build took more than {seconds:g} seconds")


def log_unrecorded(pair: Pair, error: Exception) -> None:
    """Logs that the catalogue's table of queued builds was not written."""
    log.warn(
        "queued build {pair} was not recorded: {reason}: a restart may resume fewer builds",
        pair=str(pair),
        reason=str(error),
    )


def log_end(
    build: RunningBuild,
    outcome: DeltaRow | Failure,
    seconds: float,
    names: Mapping[Digest, ImageNames],
) -> None:
    """Logs the end of a build, by what it means for operators. ``names`` are those of its images,
    by the digests of their manifests.
    """
    pair, level = build.pair, LogLevel.info
    template = "build: pair={pair} outcome={outcome}"
    fields: dict[str, object] = {"pair": str(pair), "seconds": seconds}
    if pair.kind == "v3":
        template = "build: pair={pair} form={form} outcome={outcome}"
        fields["form"] = pair.form.value
    if isinstance(outcome, DeltaRow):
        template += " full={full} delta={delta} seconds={seconds:.2f}"
        fields["outcome"] = "ready" if build.turn or build.rebuild else "elsewhere"
        fields |= {"full": outcome.full_bytes, "delta": outcome.delta_bytes}
    else:
        template += " seconds={seconds:.2f} reason={reason}"
        fields |= {"outcome": "skipped", "reason": str(outcome.value)}
        if verdict_of(outcome.value).fault:
            fields["outcome"], level = "failed", LogLevel.warn
    for part, image in (("base", pair.base), ("target", pair.target)):
        # Images name themselves: quotes keep a name from looking like another field.
        if name := str(names.get(image.manifest.digest, "")):
            template += f" {part}={{{part}!r}}"
            fields[part] = name
    log.emit(level, template, **fields)
