"""Clients that flood the build queue delay no other client for long."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from obdelta.builds.queue import FairQueue, Owner, Priority
from obdelta.concurrency.shares import HALF_LIFE
from obdelta.errors import QueueFull
from obdelta.store.fleets import Fleets
from tests.support.queue import Builds


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
