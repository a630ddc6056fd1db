"""Reloads after signals, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import pytest
from twisted.internet.task import Clock

from obdelta.app.process import RELOAD_INTERVAL, ReloadRequests
from obdelta.concurrency.reactor import IReactor


class Reactor(Clock):
    """Twisted's clock has no ``callFromThread``."""

    def callFromThread(self, call: Callable[[], object]) -> None:
        self.callLater(0, call)


def test_a_signal_causes_one_reload_at_once() -> None:
    reactor, reloads = Reactor(), list[float]()
    requests = ReloadRequests(cast(IReactor, reactor), lambda: reloads.append(reactor.seconds()))
    requests.request()
    assert reloads == [], "not within the signal handler"
    reactor.pump([0, 0])
    assert reloads == [0]
    reactor.advance(100)
    assert reloads == [0]


def test_many_signals_cause_one_reload_a_second_and_one_after_the_last() -> None:
    reactor, reloads = Reactor(), list[float]()
    requests = ReloadRequests(cast(IReactor, reactor), lambda: reloads.append(reactor.seconds()))
    for _ in range(1000):
        requests.request()
        reactor.advance(0.01)
        assert len(reactor.getDelayedCalls()) <= 1
    last = reactor.seconds()
    requests.request()
    reactor.pump([0.01] * 200)
    assert 10 <= len(reloads) <= 12
    assert all(after - before >= RELOAD_INTERVAL for before, after in pairwise(reloads))
    assert reloads[-1] >= last
    assert reactor.getDelayedCalls() == []


def test_a_signal_during_a_reload_leads_to_another_one() -> None:
    reactor, reloads = Reactor(), list[float]()

    def reload() -> None:
        reloads.append(reactor.seconds())
        if len(reloads) == 1:
            requests.request()

    requests = ReloadRequests(cast(IReactor, reactor), reload)
    requests.request()
    reactor.pump([0, 0, 0])
    assert len(reloads) == 1
    reactor.advance(RELOAD_INTERVAL)
    assert len(reloads) == 2


def test_a_reload_that_fails_does_not_stop_later_ones() -> None:
    reactor, reloads = Reactor(), list[float]()

    def reload() -> None:
        reloads.append(reactor.seconds())
        raise KeyError

    requests = ReloadRequests(cast(IReactor, reactor), reload)
    for _ in range(2):
        requests.request()
        with pytest.raises(KeyError):
            reactor.pump([0, RELOAD_INTERVAL])
    assert len(reloads) == 2
