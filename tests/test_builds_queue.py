"""The queue: bounded, fair, and never out of step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred

from obdelta.builds.queue import FairQueue
from obdelta.errors import QueueFull

Place = Deferred[Callable[[], None]]


def leave(place: Place) -> None:
    place.addCallback(lambda give_back: give_back())


def test_fleets_take_turns() -> None:
    queue = FairQueue(1, 0)
    order: list[str] = []
    running = queue.enter("first")

    def begin(name: str, give_back: Callable[[], None]) -> None:
        order.append(name)
        give_back()

    for fleet in ("big", "big", "big", "big", "small", "small", "tiny"):
        queue.enter(fleet).addCallback(partial(begin, fleet))
    leave(running)
    assert order == ["big", "small", "tiny", "big", "small", "big", "big"]
    assert queue.waiting == 0


def test_a_full_queue_takes_nobody_and_leaving_makes_room() -> None:
    queue = FairQueue(1, 2)
    running, first, second = queue.enter("a"), queue.enter("a"), queue.enter("b")
    with pytest.raises(QueueFull):
        queue.enter("c")
    first.addErrback(lambda failure: failure.trap(CancelledError) and None)
    first.cancel()
    third = queue.enter("c")
    leave(running)
    assert second.called
    assert not third.called


class Model(RuleBasedStateMachine):
    """Against a list of waiters and a count of those inside."""

    SLOTS, MOST = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(self.SLOTS, self.MOST)
        self.waiting: list[tuple[str, Place]] = []
        self.inside: list[Callable[[], None]] = []
        self.passed: Counter[str] = Counter()
        """How often others of one fleet went in while another waited, since that one's last turn."""

    @rule(fleet=st.sampled_from("abc"))
    def enter(self, fleet: str) -> None:
        full = len(self.inside) == self.SLOTS and len(self.waiting) == self.MOST
        try:
            place = self.queue.enter(fleet)
        except QueueFull:
            assert full
            return
        assert not full
        self.waiting.append((fleet, place))
        place.addCallback(lambda give_back: self.went_in(fleet, place, give_back))

    def went_in(self, fleet: str, place: Place, give_back: Callable[[], None]) -> None:
        same = [other for name, other in self.waiting if name == fleet]
        assert same[0] is place, "within a fleet, first come first served"
        self.waiting.remove((fleet, place))
        self.inside.append(give_back)
        for other in {name for name, _ in self.waiting} - {fleet}:
            self.passed[fleet + other] += 1
            assert self.passed[fleet + other] <= 2, "nobody is passed by the same fleet again and again"
        for other in "abc":
            self.passed[other + fleet] = 0

    @precondition(lambda self: self.inside)
    @rule(number=st.integers(0, 10), twice=st.booleans())
    def leave(self, number: int, twice: bool) -> None:
        give_back = self.inside.pop(number % len(self.inside))
        give_back()
        if twice:
            give_back()

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 10))
    def give_up(self, number: int) -> None:
        fleet, place = self.waiting.pop(number % len(self.waiting))
        place.addErrback(lambda failure: failure.trap(CancelledError) and None)
        place.cancel()
        if fleet not in {name for name, _ in self.waiting}:
            for other in "abc":
                self.passed[other + fleet] = 0

    @invariant()
    def in_step(self) -> None:
        assert self.queue.waiting == len(self.waiting)
        assert len(self.inside) <= self.SLOTS
        assert not self.waiting or len(self.inside) == self.SLOTS


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
