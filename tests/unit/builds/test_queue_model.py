"""The build queue against a model of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from obdelta.builds.queue import Entry, FairQueue, Owner, Priority, Release
from obdelta.errors import QueueFull


class Model(RuleBasedStateMachine):
    """Compares the queue with a list of waiters and a list of running builds."""

    SLOTS, LIMIT = 3, 6

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = FairQueue(self.SLOTS, self.LIMIT, self.clock)
        self.waiting: list[Entry] = []
        self.inside: dict[Entry, Release] = {}
        self.evicted: list[Entry] = []
        self.joined: set[Entry] = set()

    @rule(
        subject=st.sampled_from("xyz"),
        fleet=st.sampled_from("abc"),
        image=st.sampled_from("tu"),
        priority=st.sampled_from(Priority),
    )
    def enter(self, subject: str, fleet: str, image: str, priority: Priority) -> None:
        who = Owner(subject, fleet, priority, image)
        before = list(self.waiting)
        try:
            entry = self.queue.enter(who)
        except QueueFull:
            self.check_evicted(before, None, who)
            return
        self.waiting.append(entry)
        entry.place.addCallbacks(partial(self.went_in, entry), partial(self.left, entry))
        if self.evicted:
            self.check_evicted(before, self.evicted.pop(), who)
            assert not self.evicted
        assert len(self.waiting) <= self.LIMIT

    def check_evicted(self, before: list[Entry], evicted: Entry | None, new: Owner) -> None:
        """Checks the dropped entry: the newest of the longest queue of the lowest priority, first
        by targets, then by subjects; None: the new one.
        """
        lines = [(entry.owner, entry.sequence) for entry in before] + [(new, 10**9)]
        subjects, fleets, targets = (
            Counter(who.subject for who, _ in lines),
            Counter(who.fleet for who, _ in lines),
            Counter(who.target for who, _ in lines),
        )

        def length(who: Owner) -> tuple[int, int, int]:
            subject = subjects[who.subject]
            return who.priority, max(subject, fleets[who.fleet]), subject

        def length_in_fleet(who: Owner) -> tuple[int, int, int]:
            subject = subjects[who.subject]
            return who.priority, max(subject, targets[who.target]), subject

        if len(lines) <= self.LIMIT:
            assert fleets[new.fleet] > self.LIMIT // 2
            fleet = new.fleet
        else:
            fleet = max((*length(who), number, who.fleet) for who, number in lines)[-1]
        gone, age = (new, 10**9) if evicted is None else (evicted.owner, evicted.sequence)
        assert (*length_in_fleet(gone), age, gone.fleet) == max(
            (*length_in_fleet(who), number, fleet) for who, number in lines if who.fleet == fleet
        )

    def left(self, entry: Entry, why: Failure) -> None:
        why.trap(QueueFull, CancelledError)
        self.waiting.remove(entry)
        if why.check(QueueFull):
            self.evicted.append(entry)

    def went_in(self, entry: Entry, release: Release) -> None:
        who = entry.owner
        peers = [other for other in self.waiting if other.owner.priority <= who.priority]
        assert all(other.owner.priority == who.priority for other in peers), (
            "the best class goes first"
        )
        same = [other for other in peers if other.owner == who and other not in self.joined]
        assert entry in self.joined or same[0] is entry, "within one line, first come first served"
        subjects = Counter(other.owner.subject for other in self.inside)
        fleets = Counter(other.owner.fleet for other in self.inside)
        free = [other for other in peers if subjects[other.owner.subject] < self.SLOTS - 1]
        if free:
            assert entry in free, "one subject never takes all places while another waits"
            free = [other for other in free if fleets[other.owner.fleet] < self.SLOTS - 1]
            assert not free or entry in free, "neither does one fleet"
        self.waiting.remove(entry)
        self.inside[entry] = release

    @precondition(lambda self: self.inside)
    @rule(number=st.integers(0, 10), twice=st.booleans(), seconds=st.sampled_from([0.0, 0.5, 30.0]))
    def leave(self, number: int, twice: bool, seconds: float) -> None:
        self.clock.advance(seconds)
        release = self.inside.pop(list(self.inside)[number % len(self.inside)])
        release()
        if twice:
            release()

    @precondition(lambda self: self.waiting or self.inside)
    @rule(
        number=st.integers(0, 20),
        subject=st.sampled_from("xyz"),
        priority=st.sampled_from(Priority),
    )
    def join(self, number: int, subject: str, priority: Priority) -> None:
        entries = [*self.waiting, *self.inside]
        entry = entries[number % len(entries)]
        before = entry.owner
        if entry in self.waiting:
            self.joined.add(entry)
        self.queue.join(entry, replace(before, subject=subject, priority=priority))
        assert entry.owner.priority == min(before.priority, priority)

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 10))
    def evict_layers(self, number: int) -> None:
        entry = self.waiting[number % len(self.waiting)]
        entry.place.cancel()
        assert entry not in self.waiting

    @invariant()
    def in_step(self) -> None:
        assert self.queue.waiting == len(self.waiting)
        assert len(self.inside) <= self.SLOTS
        if len(self.inside) < self.SLOTS:
            assert all(entry.owner.priority is Priority.UNPRIVILEGED for entry in self.waiting)
            low = sum(entry.owner.priority is Priority.UNPRIVILEGED for entry in self.inside)
            assert not self.waiting or low >= self.SLOTS - 1
        subjects, fleets = self.queue._subjects, self.queue._fleets
        for entries, count in ((self.waiting, "waiting"), (self.inside, "held")):
            for name in "xyz":
                assert getattr(subjects, count)(name) == sum(
                    entry.owner.subject == name for entry in entries
                )
            for name in "tu":
                assert getattr(self.queue._targets, count)(name) == sum(
                    entry.owner.target == name for entry in entries
                )
            for name in "abc":
                assert getattr(fleets, count)(name) == sum(
                    entry.owner.fleet == name for entry in entries
                )


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
