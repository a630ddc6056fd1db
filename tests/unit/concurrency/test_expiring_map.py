"""Bounded maps: which entry is removed, and when."""

from __future__ import annotations

from twisted.internet.task import Clock

from obdelta.concurrency.expiring_map import ExpiringMap, LruMap


def test_the_oldest_used_entry_is_evicted() -> None:
    entries: LruMap[str, int | None] = LruMap(2)
    entries.set("a", 1)
    entries.set("b", None)
    assert entries.get("a") == 1 and "b" in entries
    assert entries.peek("b") is None
    entries.set("c", 3)
    assert "b" not in entries and entries.get("a") == 1 and len(entries) == 2
    assert entries.pop("a") == 1 and entries.pop("a") is None
    entries.clear()
    assert not len(entries)


def test_each_entry_has_its_own_expiry() -> None:
    clock = Clock()
    entries: ExpiringMap[str, int] = ExpiringMap(10, clock.seconds)
    entries.set("long", 1, 60)
    entries.set("short", 2, 10)
    clock.advance(9.9)
    assert (entries.get("long"), entries.get("short")) == (1, 2)
    clock.advance(0.1)
    assert (entries.get("long"), entries.get("short")) == (1, None)
    assert "short" not in entries and entries.pop("short") is None
    entries.set("long", 3, 60)
    clock.advance(59)
    assert entries.pop("long") == 3 and entries.get("long") is None


def test_expired_entries_take_no_memory_and_the_oldest_goes_first() -> None:
    clock = Clock()
    entries: ExpiringMap[int, bool] = ExpiringMap(3, clock.seconds)
    for number in range(5):
        entries.set(number, True, 10)
    assert len(entries) == 3 and 1 not in entries and 2 in entries
    entries.set(2, True, 10)
    entries.set(5, True, 10)
    assert 3 not in entries and 2 in entries
    clock.advance(10)
    assert len(entries) == 0
