"""Limits on recent events, with a clock that the test moves."""

from __future__ import annotations

from twisted.internet.task import Clock

from obdelta.concurrency.limits import DecayingLimit


def test_counted_events_decay() -> None:
    clock = Clock()
    limit = DecayingLimit(clock, 10, 2.0)
    assert not any(limit.add("a") for _ in range(10))
    assert not limit.exceeded("a")
    assert limit.add("a"), "the first one above the limit"
    assert limit.exceeded("a") and not limit.exceeded("b")
    clock.advance(0.5)
    assert not limit.exceeded("a")
    assert not limit.add("a"), "reported already"
    assert limit.exceeded("a")


def test_a_second_without_events_is_enough() -> None:
    clock = Clock()
    limit = DecayingLimit(clock, 10, 2.0)
    for _ in range(1000):
        limit.add("a")
    clock.advance(0.9)
    assert limit.exceeded("a")
    clock.advance(0.1)
    assert not limit.exceeded("a")


def test_keys_are_forgotten() -> None:
    clock = Clock()
    limit = DecayingLimit(clock, 10, 2.0)
    for _ in range(1000):
        limit.add("a")
    clock.advance(6)
    limit.add("b")
    assert len(limit._keys) == 1 and "b" in limit._keys
    assert [limit.add("a") for _ in range(11)].count(True) == 1, "it is reported anew"
    for number in range(limit.MAX_KEYS + 5):
        limit.add(str(number))
    assert len(limit._keys) == limit.MAX_KEYS and str(number) in limit._keys
