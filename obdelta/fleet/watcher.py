"""Watches openBalena's API for finalized releases, and has their deltas built before devices ask.

Everything that goes wrong here stays here: it is logged once, shown to operators, and tried again
later. Nothing that devices need waits for the API.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from obdelta.builds.prebuild import MAX_JOBS, Budget, Job, PrebuildLists, Preparation
from obdelta.errors import ObdeltaError, TooManyRequests
from obdelta.fleet.release_plan import plan
from obdelta.fleet.releases import FleetReader, Release, Running, written
from obdelta.observability import Metrics
from obdelta.registry import Credentials
from obdelta.store.catalogue.tables.fleet_images import FleetImages, KnownImage

log = Logger()

LOOK_BACK = timedelta(days=1)
"""Releases that were finalized within this time before a start are prepared, too: kept deltas cost
a look-up each, and those that a restart interrupted are finished.
"""
OVERLAP = timedelta(minutes=5)
"""Each poll looks back this far before the last release: the API's transactions end in any order.
"""
MAX_PAUSE = 900.0
"""Seconds between two polls at most, after failures in a row."""
AT_ONCE = 4
"""Releases whose deltas are built at a time."""
RETRY = 10.0
"""Seconds until a list is tried again, if too many lists were open."""
MAX_SEEN = 10_000
REMEMBERED = 50
"""Releases that operators can look at."""


@dataclass(slots=True, eq=False)
class PreparedRelease:
    """A release and the state of its deltas. ``seen`` and ``ended`` in seconds UTC; ``devices`` run
    one of the ``bases``. ``jobs``: how many deltas are in each state.
    """

    release: Release
    seen: float
    state: str = "waiting"
    bases: int = 0
    devices: int = 0
    list_id: str | None = None
    jobs: Sequence[Job] = ()
    ended: float | None = None
    problem: str | None = None

    def counts(self) -> dict[str, int]:
        """Returns how many deltas are in each state."""
        found: dict[str, int] = {}
        for job in self.jobs:
            found[job.state] = found.get(job.state, 0) + 1
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Rules of preparation: see the settings ``prepare-…``."""

    poll: float
    devices: int
    rollback: int
    seconds: float
    bytes: int


class ReleaseWatcher:
    """Polls the API, plans, and hands lists of pairs over. ``now`` returns seconds UTC."""

    def __init__(
        self,
        *,
        reader: FleetReader,
        images: FleetImages,
        lists: PrebuildLists,
        credentials: Credentials,
        rules: Rules,
        metrics: Metrics,
        clock: IReactorTime,
        now: Callable[[], float],
    ) -> None:
        self._reader, self._images, self._lists = reader, images, lists
        self._credentials, self._rules, self._metrics = credentials, rules, metrics
        self._clock, self._now = clock, now
        self._since = datetime.fromtimestamp(now(), UTC) - LOOK_BACK
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._slots = DeferredSemaphore(AT_ONCE)
        self._tasks: set[Deferred[None]] = set()
        self._timer: IDelayedCall | None = None
        self._polling: Deferred[None] | None = None
        self._again = self._closed = False
        self._failures = 0
        self.releases: OrderedDict[int, PreparedRelease] = OrderedDict()
        """The latest releases that were seen, the newest last."""
        self.problem: str | None = None
        self.problem_since = self.polled = 0.0
        """Why the last poll failed, and since when polls fail; when the last one worked."""

    # -- polls

    def poll(self) -> None:
        """Starts a poll now. If one is running, another follows it."""
        if self._closed:
            return
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._polling is not None:
            self._again = True
            return
        self._polling = ensureDeferred(self._poll())
        self._polling.addErrback(
            lambda failure: log.failure("openBalena's API was not polled", failure)
        )
        self._polling.addBoth(self._polled)

    def _polled(self, _result: None) -> None:
        self._polling = None
        if self._again and not self._closed:
            self._again = False
            self.poll()
        elif not self._closed:
            pause = self._rules.poll * 2 ** min(self._failures, 10)
            most = max(self._rules.poll, MAX_PAUSE)
            self._timer = self._clock.callLater(min(pause, most), self.poll)

    async def _poll(self) -> None:
        try:
            found = await self._reader.finalized(written(self._since - OVERLAP))
        except ObdeltaError as error:
            self._failed(error)
            return
        except CancelledError:
            return
        if self.problem is not None:
            log.info("openBalena's API answers again")
        self.problem, self._failures, self.polled = None, 0, self._now()
        self._metrics.fleet_polls.labels("ok").inc()
        # No later than now: after one row with a wrong time, nothing else would be seen.
        now = datetime.fromtimestamp(self._now(), UTC)
        for release in found:
            self._since = max(self._since, min(_read(release.updated) or self._since, now))
            if release.id not in self._seen:
                self._begin(release)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def _failed(self, error: ObdeltaError) -> None:
        if self.problem is None:
            self.problem_since = self._now()
            log.warn(
                "new releases are not seen: {reason}: devices get their deltas when they ask",
                reason=str(error),
            )
        self.problem = str(error)
        self._failures += 1
        self._metrics.fleet_polls.labels("failed").inc()

    # -- one release

    def _begin(self, release: Release) -> None:
        self._seen[release.id] = None
        entry = self.releases[release.id] = PreparedRelease(release, self._now())
        while len(self.releases) > REMEMBERED:
            self.releases.popitem(last=False)
        task = ensureDeferred(self._slots.run(lambda: ensureDeferred(self._prepare(entry))))
        self._tasks.add(task)
        task.addErrback(lambda failure: failure.trap(CancelledError) and None)
        task.addBoth(lambda _result: self._tasks.discard(task))

    async def _prepare(self, entry: PreparedRelease) -> None:
        release = entry.release
        try:
            running = await self._reader.running(release.application)
            await self.record([release, *(one.release for one in running)])
            preparation = await self._list(entry, running)
        except ObdeltaError as error:
            entry.state, entry.problem, entry.ended = "failed", str(error), self._now()
            # The next poll sees it again, with the overlap or after a restart.
            self._seen.pop(release.id, None)
            self._since = min(self._since, _read(release.updated) or self._since)
            log.warn(
                "{release} was not prepared: {reason}", release=str(release), reason=str(error)
            )
            return
        except CancelledError:
            entry.state = "stopped"
            raise
        except Exception:
            entry.state, entry.problem = "failed", "an unexpected error; the log has it"
            log.failure("preparing {release} met an unexpected error", release=str(release))
            return
        if preparation is not None:
            await _finished(preparation)
        entry.state, entry.ended = "done", self._now()
        counts = entry.counts()
        for state, count in counts.items():
            self._metrics.fleet_prepared(release.fleet, state, count)
        log.info(
            "prepared {release}: bases={bases} devices={devices} deltas={deltas}"
            " seconds={seconds:.1f}",
            release=str(release),
            bases=entry.bases,
            devices=entry.devices,
            deltas=", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "0",
            seconds=entry.ended - entry.seen,
        )

    async def _list(self, entry: PreparedRelease, running: Sequence[Running]) -> Preparation | None:
        rules = self._rules
        used = [
            one
            for one in running
            if one.devices >= rules.devices and one.release.id != entry.release.id
        ]
        entry.bases, entry.devices = len(used), sum(one.devices for one in used)
        pairs = plan(
            entry.release, used, devices=rules.devices, rollback=rules.rollback, most=MAX_JOBS
        )
        if not pairs:
            return None
        while True:
            budget = Budget(rules.seconds, rules.bytes)
            try:
                preparation = self._lists.begin(pairs, ["v3"], self._credentials, budget)
                break
            except TooManyRequests:
                await deferLater(self._clock, RETRY)
        entry.state, entry.list_id, entry.jobs = "building", preparation.id, preparation.jobs
        return preparation

    async def record(self, releases: Sequence[Release]) -> None:
        """Records the images of releases: their names, and the fleet that they belong to."""
        await self._images.record(
            [
                KnownImage(
                    image.location,
                    image.reference.repository,
                    image.reference.digest,
                    release.application,
                    release.names(image),
                )
                for release in releases
                for image in release.images
            ],
            self._now(),
        )

    # -- for operators

    @property
    def idle(self) -> bool:
        """Whether no poll runs, and no release is being prepared."""
        return self._polling is None and not self._tasks

    def note(self) -> str:
        """Returns a line for readiness. A problem here keeps nothing else from working."""
        if self.problem is not None:
            return f"fleet: {self.problem}"
        if not self.polled:
            return "fleet: openBalena's API was not asked yet"
        busy = sum(entry.ended is None for entry in self.releases.values())
        return f"fleet: openBalena's API answers; releases being prepared: {busy}"

    async def close(self) -> None:
        """Ends polls and waits. The builds belong to DeltaService."""
        self._closed = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        for task in [*self._tasks, *([self._polling] if self._polling is not None else [])]:
            task.cancel()


def _finished(preparation: Preparation) -> Deferred[None]:
    """Returns a Deferred that fires at the end of a list."""
    done: Deferred[None] = Deferred()

    def changed(job: Job | None) -> None:
        if job is None and not done.called:
            preparation.listeners.remove(changed)
            done.callback(None)

    if preparation.done:
        done.callback(None)
    else:
        preparation.listeners.append(changed)
    return done


def _read(when: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(when)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None
