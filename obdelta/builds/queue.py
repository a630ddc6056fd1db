"""The build queue: bounded, and fair between token subjects and between fleets.

**Turns.** The queue counts the seconds of build slots that each subject and each fleet used, as in
start-time fair queuing (Goyal, Vin and Cheng 1996). The build whose subject and fleet used less
goes first; the larger of their two counts decides. Within a fleet, subjects and target repositories
take turns in the same way. A subject or fleet that is new, or was idle, begins with the least count
among those that wait: idle time earns no credit, and past use is forgotten in time.

**Repositories.** An attacker can have many subjects (one for each device), and many fleets (images
that no update connects). If builds only took turns, each would wait for one build of every subject
and fleet. New repositories are harder to get, as each needs a push. Therefore every second start of
a device's build goes to the target repository that used the fewest seconds lately. If several used
equally few, the newest goes first, because the older ones may be an attacker's. So the first build
for a new repository waits for the builds that run and for one start by turns, plus two starts for
each repository that is newer. A client that creates repositories all the time gets every second
start at most, because the others go by turns. A build adds to a repository's seconds only if its
client has rights to it, so that no client can use up another's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from obdelta.concurrency.shares import RecentUse, Shares
from obdelta.errors import QueueFull

Release = Callable[[], None]
MAX_WAITING = 1000
"""Builds that wait at a time; half as many of one fleet. Even at a second each, a later one would
not start within the 15 minutes that a builder waits.
"""
START_COST = 1.0
"""Seconds that every start costs at least, so that many short builds take turns, too."""


class Priority(enum.IntEnum):
    """Classes of builds. A lower class gets a slot only when no build of a higher one waits."""

    DEVICE = 0
    """A device, or a client that could be one, waits for the delta."""
    PREPARED = 1
    """Prepared in advance, or resumed after a restart: no client is known to wait for it."""
    UNPRIVILEGED = 2
    """Requested with a token that grants nothing. Such builds leave one slot free if there are
    two or more.
    """


@dataclass(frozen=True, slots=True)
class Owner:
    """The subject and fleet that a build is counted for."""

    subject: str
    fleet: str
    priority: Priority = Priority.DEVICE
    target: str = ""
    """The repository of the target image."""


class Entry:
    """One build that waits for a slot or holds one.

    ``place`` fires with the function that releases the slot (idempotent), or fails with QueueFull
    when the entry is evicted. Cancelling it leaves the queue.
    """

    __slots__ = ("charged", "owner", "place", "sequence")

    def __init__(self, owner: Owner, sequence: int, place: Deferred[Release]) -> None:
        self.owner, self.sequence, self.place = owner, sequence, place
        self.charged = 0.0
        """The time up to which the slot is charged."""


class FairQueue:
    """Gives slots to at most ``slots`` builds; up to ``most`` wait (0: no limit), half as many of
    one fleet.

    With two or more slots, no subject and no fleet gets the last one while another of the same
    class waits. When the queue is full, the newest entry of the longest line is evicted, which may
    be the new one. Within a fleet, the target with the most entries loses first.
    """

    def __init__(self, slots: int, most: int, clock: IReactorTime) -> None:
        self._slots, self._most, self._clock = slots, most, clock
        self._max_of_fleet = max(1, most // 2)
        self._sequence = 0
        self._waiting: dict[Entry, None] = {}
        self._holding: dict[Entry, None] = {}
        self._subjects, self._fleets, self._targets = Shares(), Shares(), Shares()
        self._recent = RecentUse(clock)
        self._recent_first = True
        """Whether the next start of a device's build goes by recent use."""

    @property
    def waiting(self) -> int:
        """The number of builds that wait for a slot."""
        return len(self._waiting)

    def resize(self, slots: int) -> None:
        """Changes the number of slots. Builds that hold one above it keep it."""
        self._slots = slots
        self._fill()

    def enter(self, owner: Owner, *, admitted: bool = False) -> Entry:
        """Enters a build. Raises QueueFull, and changes nothing, when the new entry would be the
        one to evict.

        ``admitted``: the build was accepted before, and waits again; the bounds do not apply to it.
        """
        self._sequence += 1
        entry = Entry(owner, self._sequence, Deferred(lambda _: self._remove(entry)))
        self._settle()
        self._waiting[entry] = None
        self._count(owner, waiting=1)
        if owner.priority is Priority.DEVICE:
            self._recent.request(owner.target)
        self._fill()
        evicted = self._surplus(owner.fleet) if entry in self._waiting and not admitted else None
        if evicted is not None:
            waiting = len(self._waiting) - 1
            self._remove(evicted)
            if evicted is entry:
                raise QueueFull(waiting)
            evicted.place.errback(QueueFull(waiting))
        return entry

    def join(self, entry: Entry, owner: Owner) -> None:
        """Adds another client of the same build. The build is counted for the client whose turn
        comes first, and keeps its age.
        """
        if owner == entry.owner:
            return
        before = entry.owner
        if owner.priority is Priority.DEVICE:
            self._recent.request(owner.target)
        if entry in self._waiting:
            self._settle()
            self._count(owner, waiting=1)
            if self._standing(owner) < self._standing(before):
                entry.owner = owner
                self._count(before, waiting=-1)
                self._fill()
            else:
                self._count(owner, waiting=-1)
        elif owner.priority < before.priority:
            if entry in self._holding:
                self._settle()
                self._count(owner, held=1)
                self._count(before, held=-1)
            entry.owner = owner
            self._fill()

    # -- accounts

    def _count(self, owner: Owner, *, waiting: int = 0, held: int = 0) -> None:
        self._subjects.change(owner.subject, waiting=waiting, held=held)
        self._fleets.change(owner.fleet, waiting=waiting, held=held)
        self._targets.change(owner.target, waiting=waiting, held=held)

    def _charge(self, owner: Owner, seconds: float) -> None:
        self._subjects.charge(owner.subject, seconds)
        self._fleets.charge(owner.fleet, seconds)
        self._targets.charge(owner.target, seconds)
        if owner.priority is Priority.DEVICE:
            self._recent.charge(owner.target, seconds)

    def _settle(self) -> None:
        """Charges the entries that hold slots for the time up to now."""
        now = self._clock.seconds()
        for entry in self._holding:
            if now > entry.charged:
                self._charge(entry.owner, now - entry.charged)
                entry.charged = now

    def _standing(self, owner: Owner) -> tuple[int, float, float, float]:
        """Returns the sort key of an owner: the smallest goes first."""
        subject, fleet = self._subjects.ahead(owner.subject), self._fleets.ahead(owner.fleet)
        target = self._targets.ahead(owner.target)
        return owner.priority, max(subject, fleet), max(subject, target), subject

    # -- bounds

    def _remove(self, entry: Entry) -> None:
        if entry in self._waiting:
            del self._waiting[entry]
            self._count(entry.owner, waiting=-1)

    def _surplus(self, fleet: str) -> Entry | None:
        """Returns the entry to evict if one more of ``fleet`` waits, if any."""
        if not self._most:
            return None
        if len(self._waiting) > self._most:
            fleet = max(self._waiting, key=self._length).owner.fleet
        elif self._fleets.waiting(fleet) <= self._max_of_fleet:
            return None
        return max(
            (entry for entry in self._waiting if entry.owner.fleet == fleet),
            key=self._length_in_fleet,
        )

    def _length(self, entry: Entry) -> tuple[int, int, int, int]:
        """Returns the key by which a fleet loses an entry, greatest first: lowest class, longest
        line, newest.
        """
        owner = entry.owner
        subject, fleet = self._subjects.waiting(owner.subject), self._fleets.waiting(owner.fleet)
        return owner.priority, max(subject, fleet), subject, entry.sequence

    def _length_in_fleet(self, entry: Entry) -> tuple[int, int, int, int]:
        """Returns the key by which a fleet loses entries, greatest first: the lowest class, then
        the target or subject with the most entries, then the subject with the most, then the
        newest.
        """
        owner = entry.owner
        subject = self._subjects.waiting(owner.subject)
        line = max(subject, self._targets.waiting(owner.target))
        return owner.priority, line, subject, entry.sequence

    # -- slots

    def _fill(self) -> None:
        while len(self._holding) < self._slots and (entry := self._next()) is not None:
            self._remove(entry)
            self._holding[entry] = None
            self._count(entry.owner, held=1)
            entry.charged = self._clock.seconds() + START_COST
            self._charge(entry.owner, START_COST)
            entry.place.callback(self._release_of(entry))

    def _next(self) -> Entry | None:
        if not self._waiting:
            return None
        best = min(entry.owner.priority for entry in self._waiting)
        if best is Priority.UNPRIVILEGED and 1 < self._slots <= 1 + self._unprivileged():
            return None
        candidates = [entry for entry in self._waiting if entry.owner.priority == best]
        if self._slots > 1:
            candidates = self._without_full(
                candidates, self._subjects, lambda entry: entry.owner.subject
            )
            candidates = self._without_full(
                candidates, self._fleets, lambda entry: entry.owner.fleet
            )
        if best is Priority.DEVICE:
            by_recent_use, self._recent_first = self._recent_first, not self._recent_first
            if by_recent_use:
                # The clock goes on, so each target is looked up once.
                targets = {entry.owner.target for entry in candidates}
                first = min(targets, key=self._recent.order)
                candidates = [entry for entry in candidates if entry.owner.target == first]
        return min(candidates, key=lambda entry: (*self._standing(entry.owner), entry.sequence))

    def _unprivileged(self) -> int:
        return sum(entry.owner.priority is Priority.UNPRIVILEGED for entry in self._holding)

    def _without_full(
        self, candidates: list[Entry], shares: Shares, key: Callable[[Entry], str]
    ) -> list[Entry]:
        """Omits entries of owners that hold all slots but one, if other entries remain."""
        return [
            entry for entry in candidates if shares.held(key(entry)) < self._slots - 1
        ] or candidates

    def _release_of(self, entry: Entry) -> Release:
        def release() -> None:
            if entry in self._holding:
                self._settle()
                del self._holding[entry]
                self._count(entry.owner, held=-1)
                self._fill()

        return release
