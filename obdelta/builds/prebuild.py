"""Deltas that are prepared before devices ask: builds lists of pairs, and records each job's state.

The lists live in this process only. A restart forgets the lists, not the deltas, and resumes queued
builds.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.queue import Priority
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import Answer, FullPull, Published, Ready
from obdelta.errors import ObdeltaError, QueueFull, TooManyRequests
from obdelta.oci import Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import DeltaRow, Kind

log = Logger()

WAIT = 86400.0
"""Seconds that one delta may take, its wait in the queue included."""
QUEUE_PAUSE = 5.0
"""Seconds between retries while the queue is full."""
MAX_JOBS = 1000
MAX_OPEN = 16
KEPT = 64
KEPT_JOBS = 4000
"""Limits of the finished lists that are remembered: lists, and jobs of all of them. The newest list
is remembered in any case.
"""
CLIENT = "operators"
FINAL = frozenset(("ready", "full-pull", "failed", "skipped"))


class Deltas(Protocol):
    """The part of DeltaService that is used here."""

    @property
    def watchers(self) -> list[Any]:
        """See :attr:`obdelta.builds.service.DeltaService.watchers`."""

    async def delta(
        self,
        kind: Kind,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        wait: float,
        client: str = "",
        *,
        priority: Priority = Priority.DEVICE,
    ) -> Answer:
        """See :meth:`obdelta.builds.service.DeltaService.delta`."""


@dataclass(slots=True, eq=False)
class Job:
    """One delta. ``state``: ``waiting``, ``building``, ``ready``, ``full-pull`` (there will be
    none), ``failed``, ``skipped`` (the list's budget was used up before).

    ``category`` and ``full_bytes`` of a full pull are those of
    :class:`~obdelta.builds.types.FullPull`.
    """

    id: str
    kind: Kind
    base: Reference
    target: Reference
    state: str = "waiting"
    reason: str | None = None
    category: str | None = None
    name: str | None = None
    full_bytes: int | None = None
    delta_bytes: int | None = None
    seconds: float = 0.0
    progress: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns the job as the API shows it. ``ratio``: the delta's share of a full pull."""
        ratio = None
        if self.full_bytes and self.delta_bytes is not None:
            ratio = round(self.delta_bytes / self.full_bytes, 4)
        return {
            "id": self.id,
            "kind": self.kind,
            "src": str(self.base),
            "dest": str(self.target),
            "state": self.state,
            "reason": self.reason,
            "category": self.category,
            "name": self.name,
            "full_bytes": self.full_bytes,
            "delta_bytes": self.delta_bytes,
            "ratio": ratio,
            "seconds": round(self.seconds, 3),
            "progress": dict(self.progress),
        }


@dataclass(slots=True, eq=False)
class Budget:
    """The seconds of building and the bytes of deltas that a list may take. Builds that run when
    it is used up are finished.
    """

    seconds: float
    bytes: int

    @property
    def used_up(self) -> str | None:
        """Returns which of the two is used up, None if neither is."""
        if self.seconds <= 0:
            return "seconds"
        return "bytes" if self.bytes <= 0 else None

    def take(self, seconds: float, size: int) -> None:
        self.seconds -= seconds
        self.bytes -= size


@dataclass(slots=True, eq=False)
class Preparation:
    """One list. ``listeners`` are called with each job that changed, and with None at the end."""

    id: str
    jobs: Sequence[Job]
    budget: Budget | None = None
    listeners: list[Callable[[Job | None], None]] = field(default_factory=list)
    done: bool = False

    def as_json(self) -> dict[str, Any]:
        """Returns the list as the API shows it."""
        return {"id": self.id, "done": self.done, "jobs": [job.as_json() for job in self.jobs]}


class PrebuildLists:
    """Begins and remembers lists; a watcher of builds.

    ``at_once``: how many deltas of all lists are requested at a time. ``host`` is the registry name
    under which devices pull this server's deltas.
    """

    def __init__(self, deltas: Deltas, clock: IReactorTime, at_once: int, host: str) -> None:
        self._deltas, self._clock, self._host = deltas, clock, host
        self._slots = DeferredSemaphore(at_once)
        self._known: dict[str, Preparation] = {}
        self._tasks: dict[Deferred[None], None] = {}
        self._under_way: dict[Job, Preparation] = {}
        deltas.watchers.append(self)

    def begin(
        self,
        pairs: Sequence[tuple[Reference, Reference]],
        kinds: Sequence[Kind],
        credentials: Credentials,
        budget: Budget | None = None,
    ) -> Preparation:
        """Begins a list of every pair in every kind, in this order. Jobs that a ``budget`` leaves
        nothing for are skipped. Raises TooManyRequests while too many lists are open.
        """
        if sum(not known.done for known in self._known.values()) >= MAX_OPEN:
            raise TooManyRequests(f"{MAX_OPEN} lists are being prepared already", 60.0)
        id_ = secrets.token_hex(8)
        wanted = dict.fromkeys((kind, base, target) for base, target in pairs for kind in kinds)
        jobs = [Job(f"{id_}-{number}", *one) for number, one in enumerate(wanted, 1)]
        preparation = self._known[id_] = Preparation(id_, jobs, budget)
        self._forget()
        left = len(jobs)

        def ended(result: Failure | None, task: Deferred[None]) -> Failure | None:
            nonlocal left
            del self._tasks[task]
            left -= 1
            if not left:
                preparation.done = True
                for listener in preparation.listeners[:]:
                    listener(None)
            return result

        for job in jobs:
            task = ensureDeferred(self._job(preparation, job, credentials))
            self._tasks[task] = None
            task.addBoth(ended, task)
        return preparation

    def _forget(self) -> None:
        finished = [known for known in self._known.values() if known.done]
        jobs = sum(len(known.jobs) for known in finished)
        while len(finished) > KEPT or (len(finished) > 1 and jobs > KEPT_JOBS):
            old = finished.pop(0)
            jobs -= len(old.jobs)
            del self._known[old.id]

    def find(self, id_: str) -> Preparation | Job | None:
        """Returns a list by its ID, or a job by its own."""
        known = self._known.get(id_.partition("-")[0])
        if known is None or known.id == id_:
            return known
        return next((job for job in known.jobs if job.id == id_), None)

    async def _job(self, preparation: Preparation, job: Job, credentials: Credentials) -> None:
        started = self._clock.seconds()
        try:
            await self._slots.acquire()
            try:
                if preparation.budget is not None and (out := preparation.budget.used_up):
                    self._change(
                        preparation,
                        job,
                        state="skipped",
                        reason=f"the release's budget of {out} is used up",
                    )
                    return
                self._under_way[job] = preparation
                self._change(preparation, job, state="building")
                begun = self._clock.seconds()
                answer = await self._request(job, credentials)
                if preparation.budget is not None:
                    preparation.budget.take(*_costs(answer, self._clock.seconds() - begun))
            finally:
                self._under_way.pop(job, None)
                self._slots.release()
        except ObdeltaError as error:
            self._change(
                preparation,
                job,
                state="failed",
                reason=str(error),
                seconds=self._clock.seconds() - started,
            )
        except CancelledError:
            self._change(preparation, job, state="failed", reason="the server is stopping")
        except Exception:
            log.failure("preparing {job} met an unexpected error", job=job.id)
            self._change(
                preparation, job, state="failed", reason="an unexpected error: see the log"
            )
        else:
            self._change(
                preparation,
                job,
                **_outcome(answer, self._host),
                seconds=self._clock.seconds() - started,
            )

    async def _request(self, job: Job, credentials: Credentials) -> Answer:
        while True:
            try:
                return await self._deltas.delta(
                    job.kind,
                    job.base,
                    job.target,
                    credentials,
                    WAIT,
                    CLIENT,
                    priority=Priority.PREPARED,
                )
            except QueueFull:
                # Devices go first: this can wait.
                await deferLater(self._clock, QUEUE_PAUSE)

    def _change(self, preparation: Preparation, job: Job, **changed: Any) -> None:
        for name, value in changed.items():
            setattr(job, name, value)
        if job.state in FINAL:
            job.progress = {}
        for listener in preparation.listeners[:]:
            listener(job)

    # -- as a watcher of builds

    def requested(self, kind: Kind, found: str) -> None:
        """Does nothing."""

    def changed(self, build: RunningBuild) -> None:
        """Records the progress of a job's build."""
        pair = build.pair
        built = (pair.kind, pair.base.repository, pair.target.repository)
        for job, preparation in list(self._under_way.items()):
            if (job.kind, job.base.repository, job.target.repository) == built:
                self._change(preparation, job, progress=dict(build.progress))

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Does nothing: the job's own wait ends too."""

    async def close(self) -> None:
        """Cancels every list. The builds belong to DeltaService."""
        # Jobs that wait for a slot come first: they must not get the slots that the others release.
        for task in reversed(list(self._tasks)):
            task.cancel()


def _costs(answer: Answer, elapsed: float) -> tuple[float, int]:
    """Returns the seconds of building, without a wait in the queue, and the bytes of a delta."""
    match answer:
        case Ready(delta=row):
            return min(elapsed, row.seconds), row.delta_bytes
        case Published(delta_bytes=size):
            return elapsed, size
    return elapsed, 0


def _outcome(answer: Answer, host: str) -> dict[str, Any]:
    match answer:
        case Ready(pair=pair, delta=row):
            name = (
                None if row.tag is None else str(Reference(host, pair.target.repository, row.tag))
            )
            return {
                "state": "ready",
                "name": name,
                "full_bytes": row.full_bytes,
                "delta_bytes": row.delta_bytes,
            }
        case Published(name=name, full_bytes=full, delta_bytes=delta):
            return {"state": "ready", "name": str(name), "full_bytes": full, "delta_bytes": delta}
        case FullPull(reason=reason, category=category, full_bytes=full):
            return {
                "state": "full-pull",
                "reason": reason,
                "category": category,
                "full_bytes": full,
            }
    raise TypeError("no list accepts a delta that is still being written")
