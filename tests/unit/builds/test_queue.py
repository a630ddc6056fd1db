"""The queue: bounded, fair between subjects and between fleets, and never inconsistent."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from obdelta.builds.queue import (
    Entry,
    FairQueue,
    Owner,
    Priority,
    Release,
)
from obdelta.concurrency.shares import HALF_LIFE, MAX_TARGETS
from obdelta.errors import QueueFull
from obdelta.store.fleets import Fleets


def owner(subject: str, fleet: str = "", priority: Priority = Priority.DEVICE) -> Owner:
    return Owner(subject, fleet or subject, priority)


class Builds:
    """A queue whose builds the test ends. ``started``: the owners in the order of their starts."""

    def __init__(self, slots: int, most: int = 0) -> None:
        self.clock = Clock()
        self.queue = FairQueue(slots, most, self.clock)
        self.started: list[Owner] = []
        self.running: deque[Release] = deque()
        self.evicted: list[Owner] = []

    def enter(self, who: Owner) -> Entry:
        entry = self.queue.enter(who)
        entry.place.addCallbacks(
            lambda release: self._begin(entry, release), lambda why: self._leave(who, why)
        )
        return entry

    def _begin(self, entry: Entry, release: Release) -> None:
        self.started.append(entry.owner)
        self.running.append(release)

    def _leave(self, who: Owner, why: Failure) -> None:
        why.trap(QueueFull)
        self.evicted.append(who)

    def finish(self, seconds: float = 0.0) -> None:
        """Ends the oldest running build."""
        self.clock.advance(seconds)
        self.running.popleft()()

    def finish_all(self, seconds: float = 0.0) -> list[str]:
        while self.running:
            self.finish(seconds)
        return [who.subject for who in self.started]


def test_fleets_take_turns() -> None:
    builds = Builds(1)
    for subject in ("first", "big", "big", "big", "big", "small", "small", "tiny"):
        builds.enter(owner(subject))
    assert builds.finish_all() == ["first", "big", "small", "tiny", "big", "small", "big", "big"]
    assert builds.queue.waiting == 0


def test_one_subject_with_many_fleets_is_one_subject() -> None:
    builds = Builds(2)
    for number in range(20):
        builds.enter(owner("hostile", f"fleet {number}"))
    builds.finish(10)
    builds.enter(owner("device"))
    builds.enter(owner("device"))
    builds.finish(10)
    assert builds.started[-1].subject == "device"
    builds.finish(10)
    assert [who.subject for who in builds.started[-2:]] == ["device", "hostile"], (
        "never both places for one"
    )
    builds.finish(10)
    assert builds.started[-1].subject == "device"


def test_one_fleet_with_many_subjects_is_one_fleet() -> None:
    builds = Builds(2)
    for number in range(20):
        builds.enter(owner(f"device {number}", "hostile"))
    builds.finish(10)
    for _ in range(3):
        builds.enter(owner("mine", "victim"))
    assert builds.queue.waiting == 17 + 3
    for _ in range(6):
        builds.finish(10)
        # Both slots are in use; one of them belongs to the other fleet as long as it waits.
        assert [who.fleet for who in builds.started[-2:]].count(
            "hostile"
        ) <= 1 or builds.queue.waiting < 17
    assert [who.fleet for who in builds.started].count("victim") == 3


@pytest.mark.parametrize("slots", [2, 4])
def test_a_fleet_gets_all_slots_but_one_while_another_waits(slots: int) -> None:
    builds = Builds(slots)
    # The victim has used many seconds, so seconds alone would give the newcomer every slot.
    builds.enter(owner("victim"))
    builds.finish(1000)
    for number in range(10):
        builds.enter(owner("victim"))
        builds.enter(owner(f"device {number}", "hostile"))
    for _ in range(10):
        builds.finish(1)
        running = [who.fleet for who in builds.started[-slots:]]
        assert running.count("hostile") < slots or builds.queue.waiting < 10


def test_turns_are_measured_in_seconds_not_in_builds() -> None:
    builds = Builds(1)
    builds.enter(owner("start"))
    for number in range(300):
        builds.enter(owner("long" if number % 10 == 0 else "short"))
    seconds = Counter[str]()
    for _ in range(150):
        subject = builds.started[-1].subject
        took = 90 if subject == "long" else 10
        seconds[subject] += took
        builds.finish(took)
        if seconds["short"] and seconds["long"] and len(builds.started) > 3:
            assert abs(seconds["long"] - seconds["short"]) <= 2 * 90


@settings(max_examples=30, deadline=None)
@given(slots=st.integers(1, 4), seed=st.integers(0, 10**6), mean=st.sampled_from([0.0, 1.0, 30.0]))
def test_clients_that_always_wait_get_equal_seconds(slots: int, seed: int, mean: float) -> None:
    """The bound of start-time fair queuing: the difference is a few of the longest builds, however
    long it lasts.
    """
    chance = random.Random(seed)
    clock = Clock()
    queue = FairQueue(slots, 0, clock)
    used = Counter[str]()
    ends: list[tuple[float, int, str, Release]] = []

    def begin(fleet: str, release: Release) -> None:
        took = max(1.0, chance.expovariate(1 / (mean + 1)) * (9 if fleet == "a" else 1))
        took = min(took, 120.0)
        ends.append((clock.seconds() + took, len(used) + chance.getrandbits(30), fleet, release))
        used[fleet] += int(took)
        enter(fleet)

    def enter(fleet: str) -> None:
        entry = queue.enter(owner(f"{fleet}{chance.randrange(3)}", fleet))
        entry.place.addCallback(partial(begin, fleet))

    for _ in range(3 * slots):
        for fleet in "abc":
            enter(fleet)
    for _ in range(300):
        first = min(ends)
        ends.remove(first)
        clock.advance(max(0.0, first[0] - clock.seconds()))
        first[3]()
    assert max(used.values()) - min(used.values()) <= 130 * (slots + 2)


def test_a_sequence_of_new_subjects_delays_no_client() -> None:
    builds = Builds(1)
    builds.enter(owner("device"))
    builds.enter(owner("device"))
    builds.finish(60)  # the second one is 60 seconds ahead only of those that waited with it
    builds.enter(owner("device"))
    for number in range(20):
        builds.enter(owner(f"new {number}"))
        builds.finish(10)
        if [who.subject for who in builds.started].count("device") == 3:
            return
    raise AssertionError("newcomers went first for ever")


def test_priorities_are_kept_and_unprivileged_builds_leave_a_slot_free() -> None:
    builds = Builds(2)
    for number in range(4):
        builds.enter(owner(f"builder {number}", priority=Priority.UNPRIVILEGED))
    assert len(builds.running) == 1, "one place is left free"
    builds.enter(owner("operators", priority=Priority.PREPARED))
    builds.enter(owner("operators", priority=Priority.PREPARED))
    builds.enter(owner("device"))
    assert [who.subject for who in builds.started] == ["builder 0", "operators"]
    builds.finish()
    assert builds.started[-1].subject == "device"
    builds.finish()
    assert builds.started[-1].subject == "operators"
    builds.finish_all()
    assert [who.priority for who in builds.started[-3:]] == [Priority.UNPRIVILEGED] * 3


def test_a_single_slot_serves_every_priority() -> None:
    builds = Builds(1)
    builds.enter(owner("builder", priority=Priority.UNPRIVILEGED))
    builds.enter(owner("builder", priority=Priority.UNPRIVILEGED))
    builds.enter(owner("device"))
    assert builds.finish_all() == ["builder", "device", "builder"]


def test_a_build_takes_the_best_priority_of_its_clients() -> None:
    builds = Builds(2)
    builds.enter(owner("other", "o"))
    builds.enter(owner("other", "o"))
    low = builds.enter(owner("builder", "f", Priority.UNPRIVILEGED))
    for _ in range(3):
        builds.enter(owner("device", "f"))
    builds.queue.join(low, owner("builder 2", "f", Priority.UNPRIVILEGED))
    assert low.owner.priority is Priority.UNPRIVILEGED
    builds.queue.join(low, owner("waiting", "f"))
    builds.finish()
    assert builds.started[-1].subject == "waiting"
    # While it runs, its priority can still be raised; a later client with a lower one changes
    # nothing.
    running = builds.queue.enter(owner("builder", "f", Priority.UNPRIVILEGED))
    builds.queue.join(running, owner("operators", "f", Priority.PREPARED))
    builds.queue.join(running, owner("builder", "f", Priority.UNPRIVILEGED))
    assert running.owner.priority is Priority.PREPARED


def test_the_newest_entry_of_the_longest_queue_is_dropped() -> None:
    builds = Builds(1, most=6)
    builds.enter(owner("running"))
    for number in range(3):
        builds.enter(owner(f"device {number}", "hostile"))
    with pytest.raises(QueueFull):
        builds.enter(owner("device 4", "hostile"))  # a fleet gets at most half of the queue
    for fleet in "abc":
        builds.enter(owner(fleet))
    builds.enter(owner("newcomer"))
    assert builds.evicted == [owner("device 2", "hostile")]
    assert builds.queue.waiting == 6
    builds.enter(owner("many", "fleet 1"))
    assert builds.evicted[1:] == [owner("device 1", "hostile")]
    with pytest.raises(QueueFull):
        builds.enter(owner("many", "fleet 2"))  # a subject's queue counts over all fleets


def test_within_a_fleet_the_longest_queue_of_a_client_loses_an_entry() -> None:
    builds = Builds(1, most=6)
    builds.enter(owner("running"))
    builds.enter(owner("honest", "f"))
    builds.enter(owner("greedy", "f"))
    builds.enter(owner("greedy", "f"))
    builds.enter(owner("other", "f"))
    assert builds.evicted == [owner("greedy", "f")]


def test_the_lowest_priority_is_dropped_first() -> None:
    builds = Builds(1, most=4)
    builds.enter(owner("running"))
    builds.enter(owner("builder", priority=Priority.UNPRIVILEGED))
    builds.enter(owner("a"))
    builds.enter(owner("a"))
    builds.enter(owner("b"))
    builds.enter(owner("b"))
    assert builds.evicted == [owner("builder", priority=Priority.UNPRIVILEGED)]
    with pytest.raises(QueueFull):
        builds.enter(owner("builder", priority=Priority.UNPRIVILEGED))


def test_unprivileged_builds_that_wait_beside_a_free_slot_are_bounded_too() -> None:
    builds = Builds(2, most=4)
    with pytest.raises(QueueFull):
        for number in range(10):
            builds.enter(owner(f"builder {number}", priority=Priority.UNPRIVILEGED))
    assert (len(builds.running), builds.queue.waiting) == (1, 4)


def test_unused_entries_are_forgotten() -> None:
    builds = Builds(2)
    for number in range(2000):
        who = owner(f"device {number}", f"fleet {number}")
        builds.enter(replace(who, target=f"target {number}"))
        builds.finish(1)
    assert len(builds.queue._subjects._accounts) < 10 and len(builds.queue._fleets._accounts) < 10
    assert len(builds.queue._targets._accounts) < 10
    assert len(builds.queue._recent._uses) == 2000
    for number in range(MAX_TARGETS):
        builds.queue._recent.request(f"other {number}")
    assert len(builds.queue._recent._uses) == MAX_TARGETS


def test_the_target_with_the_longest_queue_in_a_fleet_loses_first() -> None:
    builds = Builds(1, most=8)
    builds.enter(owner("running"))
    one, other = (
        [Owner(f"{name} {number}", "f", target=name) for number in range(3)]
        for name in ("one", "other")
    )
    for who in (*one, other[0]):
        builds.enter(who)
    builds.enter(other[1])
    assert builds.evicted == [one[2]]
    # Equal queues: the subject with the most entries loses, then the newest entry.
    greedy = Owner(one[0].subject, "f", target="one")
    with pytest.raises(QueueFull):
        builds.enter(greedy)
    assert builds.queue.waiting == 4
    with pytest.raises(QueueFull):
        builds.enter(other[2])


def test_the_client_with_the_longest_queue_loses_among_equal_targets() -> None:
    builds = Builds(1, most=8)
    builds.enter(owner("running"))
    builds.enter(Owner("greedy", "f", target="one"))
    builds.enter(Owner("greedy", "f", target="other"))
    builds.enter(Owner("honest", "f", target="one"))
    builds.enter(Owner("another", "f", target="other"))
    builds.enter(Owner("newcomer", "f", target="third"))
    assert builds.evicted == [Owner("greedy", "f", target="other")]


def test_within_a_fleet_targets_take_turns() -> None:
    builds = Builds(1)
    builds.enter(owner("running", "f"))
    for number in range(6):
        builds.enter(Owner(f"device {number}", "f", target="many"))
    builds.enter(Owner("late", "f", target="few"))
    builds.finish(10)
    builds.finish(10)
    assert "few" in [who.target for who in builds.started]


def flood(fleets: Fleets, victim_first: bool, bridge: bool) -> tuple[int, int]:
    """Returns how many of 30 builds of a victim are refused, and how many start, while a hostile
    fleet keeps its half of the queue full with devices that ask once each.
    """
    builds = Builds(2, most=1000)
    number = 0

    def enter_hostile() -> None:
        nonlocal number
        target = f"evil/{number % 40}"
        who = Owner(f"evil {number}", fleets.of("evil/1", target), target=target)
        number += 1
        with suppress(QueueFull):
            builds.enter(who)

    if victim_first:
        fleets.of("victim/1", "victim/2")
        fleets.of("public/app", "victim/2")
    if bridge:
        fleets.of("public/app", "evil/1")
    for _ in range(1200):
        enter_hostile()
    refused = 0
    for turn in range(30):
        builds.clock.advance(1)
        for _ in range(min(2, len(builds.running))):
            builds.finish()
        for _ in range(5):
            enter_hostile()
        base = "victim/1" if victim_first else "public/app"
        who = Owner(f"victim {turn}", fleets.of(base, "victim/2"), target="victim/2")
        try:
            builds.enter(who)
        except QueueFull:
            refused += 1
    refused += sum(who.target == "victim/2" for who in builds.evicted)
    return refused, sum(who.target == "victim/2" for who in builds.started)


def test_an_update_from_a_public_image_bridges_no_fleets() -> None:
    refused, started = flood(Fleets(), victim_first=True, bridge=True)
    assert (refused, started) == flood(Fleets(), victim_first=True, bridge=False)
    assert refused == 0 and started >= 29


def test_an_honest_client_in_the_hostile_fleet_is_not_refused() -> None:
    """A new tenant's first update starts at a public image that is in the hostile fleet already."""
    refused, _ = flood(Fleets(), victim_first=False, bridge=True)
    assert refused == 0


FOREIGN_LIMIT = 4
ATTACKERS: dict[str, Callable[[int], tuple[str, str]]] = {
    "all pairs": lambda number: (f"evil/{number % 12}", f"evil/{(number * 7 + 1) % 12}"),
    "disjoint pairs": lambda number: (f"evil/{number % 40}/base", f"evil/{number % 40}/target"),
    "no base": lambda number: ("", f"evil/{number % 40}"),
    "a public base": lambda number: ("public/app", f"evil/{number % 40}"),
}


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    attacker=st.sampled_from(list(ATTACKERS)),
    seed=st.integers(0, 10**6),
    prelude=st.integers(4, 60),
)
def test_many_subjects_and_fleets_delay_no_update(
    slots: int, attacker: str, seed: int, prelude: int
) -> None:
    """Each hostile build has a new subject. A victim's updates follow one another; builds of other
    fleets take long and short.
    """
    chance, fleets = random.Random(seed), Fleets()
    builds = Builds(slots, most=100)
    number = 0

    def attack(times: int) -> None:
        nonlocal number
        for _ in range(times):
            number += 1
            base, target = ATTACKERS[attacker](number)
            who = Owner(f"evil {number}", fleets.of(base or target, target), target=target)
            with suppress(QueueFull):
                builds.enter(who)

    attack(45)
    for _ in range(prelude):
        builds.finish(chance.choice([0.1, 5, 60]))
        attack(2)
    for update in range(8):
        base = f"victim/{update}" if update else "public/app"
        target = f"victim/{update + 1}"
        before = len(builds.started)
        builds.enter(Owner(f"victim {update}", fleets.of(base, target), target=target))
        while target not in [who.target for who in builds.started[before:]]:
            assert len(builds.started) - before <= FOREIGN_LIMIT
            attack(1)
            builds.finish(chance.choice([0.1, 5, 60]))
        # The oldest one ends first, so this update's build is over before the next update.
        for _ in range(slots + chance.randrange(4)):
            builds.finish(chance.choice([0.1, 5]))
            attack(2)
    assert not builds.evicted or {who.target[:4] for who in builds.evicted} == {"evil"}


@pytest.mark.parametrize("newer", [0, 1, 3, 5])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_repository_waits_two_starts_for_each_newer_one(slots: int, newer: int) -> None:
    """An attack begins: its repositories are as new as the victim's, and arrive before and after
    it. Each hostile build has a new subject and a new fleet.
    """
    builds, fleets = Builds(slots, most=100), Fleets()

    def enter(name: str) -> None:
        owner = Owner(name, fleets.of(f"{name}/base", f"{name}/target"), target=f"{name}/target")
        builds.enter(owner)

    for number in range(40):
        enter(f"evil {number}")
    before = len(builds.started)
    enter("victim")
    for number in range(newer):
        enter(f"later evil {number}")
    while "victim/target" not in [who.target for who in builds.started]:
        builds.finish(5)
    assert len(builds.started) - 1 - before <= 1 + 2 * newer


@pytest.mark.parametrize("slots", [1, 2])
def test_new_repositories_get_half_of_the_starts(slots: int) -> None:
    """Each hostile build has a new subject and repository, and the victim's target is always the
    same: it has its turns.
    """
    builds, fleets = Builds(slots, most=100), Fleets()
    for number in range(60):
        base, target = f"evil/{number}", f"evil/{number + 1}"
        builds.enter(Owner(f"evil {number}", fleets.of(base, target), target=target))
        builds.enter(
            Owner(f"victim {number}", fleets.of("victim/1", "victim/2"), target="victim/2")
        )
        builds.finish(10)
    assert [who.target for who in builds.started].count("victim/2") >= 29


def test_past_use_of_a_target_decays() -> None:
    builds = Builds(1)
    for target in ("earlier", "later"):
        builds.enter(Owner(target, target, target=target))
        builds.finish(100)
        builds.clock.advance(HALF_LIFE)
    (earlier, _), (later, _) = (builds.queue._recent.order(one) for one in ("earlier", "later"))
    assert earlier < 0.5 * later < 30
    builds.enter(Owner("", "", target="new"))
    assert builds.queue._recent.order("new") == (1.0, -3)


def test_every_build_starts_though_time_passes_during_calls() -> None:
    class Steps(Clock):
        def seconds(self) -> float:
            self.rightNow += 0.001
            return float(self.rightNow)

    builds = Builds(1)
    builds.clock = Steps()
    builds.queue = FairQueue(1, 0, builds.clock)
    for number in range(20):
        builds.enter(Owner("device", "fleet", target=f"target {number % 4}"))
    builds.finish_all(5)
    assert len(builds.started) == 20


def test_only_devices_count_as_use_of_a_target() -> None:
    builds = Builds(2)
    builds.enter(Owner("builder", "f", Priority.UNPRIVILEGED, "victim"))
    builds.finish(1000)
    builds.enter(Owner("operators", "f", Priority.PREPARED, "victim"))
    builds.finish(1000)
    assert builds.queue._recent.order("victim") == (0.0, 0)


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
