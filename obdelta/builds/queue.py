"""The build queue: bounded, and fair between token subjects and between fleets.

The measure is seconds of build slots used, as in start-time fair queuing (Goyal, Vin and Cheng
1996), kept for subjects and for fleets. An entry counts as far ahead as the worse of the two.
Within a fleet, subjects and target repositories take turns in the same way. A newcomer starts
level with those that wait, so that idle time earns no credit, and past use is no debt for ever.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from obdelta.errors import QueueFull

Release = Callable[[], None]
START_COST = 1.0
"""Seconds that every start costs at least, so that many short builds take turns, too."""


class Priority(enum.IntEnum):
    """Classes of builds. A lower class gets a slot only when no build of a higher one waits."""

    DEVICE = 0
    """A device, or a client that could be one, waits for the delta."""
    PREPARED = 1
    """Prepared in advance, or resumed after a restart: no client is known to wait for it."""
    UNPRIVILEGED = 2
    """Requested with a token that grants nothing. Such builds leave one slot free where there are
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


@dataclass(slots=True)
class _Account:
    used: float
    waiting: int = 0
    held: int = 0

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.held)


class _Shares:
    """Seconds used by each subject, fleet or target, relative to a fair share of those that are
    active.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._fair = 0.0

    def waiting(self, key: str) -> int:
        account = self._accounts.get(key)
        return account.waiting if account else 0

    def held(self, key: str) -> int:
        account = self._accounts.get(key)
        return account.held if account else 0

    def ahead(self, key: str) -> float:
        """Returns the seconds used beyond a fair share."""
        return self._accounts[key].used - self._fair

    def change(self, key: str, *, waiting: int = 0, held: int = 0) -> None:
        account = self._accounts.get(key)
        if account is None or not account.active:
            self._level()
            account = self._accounts.setdefault(key, _Account(self._fair))
            account.used = max(account.used, self._fair)
        account.waiting += waiting
        account.held += held

    def charge(self, key: str, seconds: float) -> None:
        self._accounts[key].used += seconds
        # Newcomers start at the fair share. It grows with the work, so that they do not pass
        # waiting entries for ever.
        self._fair += seconds / sum(account.active for account in self._accounts.values())

    def _level(self) -> None:
        """Raises the fair share to the least use among those that wait, and forgets idle accounts
        behind it.
        """
        waiting = [account.used for account in self._accounts.values() if account.waiting]
        if waiting:
            self._fair = max(self._fair, min(waiting))
        busy = any(account.active for account in self._accounts.values())
        for key, account in list(self._accounts.items()):
            if not account.active and (not busy or account.used <= self._fair):
                del self._accounts[key]


class FairQueue:
    """Gives slots to at most ``slots`` builds; up to ``most`` wait (0: no limit), half as many of
    one fleet.

    Where two or more slots exist, one subject, and one fleet, gets all but one while another of
    its class waits. When the queue is full, the newest entry of the longest line is evicted: that
    may be the new one. Within a fleet, the target with the most entries loses first.
    """

    def __init__(self, slots: int, most: int, clock: IReactorTime) -> None:
        self._slots, self._most, self._clock = slots, most, clock
        self._most_of_fleet = max(1, most // 2)
        self._sequence = 0
        self._waiting: dict[Entry, None] = {}
        self._holding: dict[Entry, None] = {}
        self._subjects, self._fleets, self._targets = _Shares(), _Shares(), _Shares()

    @property
    def waiting(self) -> int:
        """The number of builds that wait for a slot."""
        return len(self._waiting)

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
        """Adds another client of the same build: the build gets the better standing of the two. Its
        age stays.
        """
        if owner == entry.owner:
            return
        before = entry.owner
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
        """Returns the entry to evict where one more of ``fleet`` waits, if any."""
        if not self._most:
            return None
        if len(self._waiting) > self._most:
            fleet = max(self._waiting, key=self._length).owner.fleet
        elif self._fleets.waiting(fleet) <= self._most_of_fleet:
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
        """Returns the eviction key within a fleet, greatest first: lowest class, the target or
        subject with the most entries, then the subject with the most, newest.
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
        return min(candidates, key=lambda entry: (*self._standing(entry.owner), entry.sequence))

    def _unprivileged(self) -> int:
        return sum(entry.owner.priority is Priority.UNPRIVILEGED for entry in self._holding)

    def _without_full(
        self, candidates: list[Entry], shares: _Shares, key: Callable[[Entry], str]
    ) -> list[Entry]:
        """Omits entries of owners that hold all slots but one, where other entries remain."""
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
