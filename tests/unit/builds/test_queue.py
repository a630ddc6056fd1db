"""The queue: bounded, and fair between subjects and between fleets."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from obdelta.builds.queue import FairQueue, Owner, Priority, Release
from obdelta.concurrency.shares import MAX_TARGETS
from obdelta.errors import QueueFull
from tests.support.queue import Builds, owner


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
