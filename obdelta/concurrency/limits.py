"""Limits on how many things a client may hold at a time (TooManyRequests), and on the time of a
wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.errors import TooManyRequests

T = TypeVar("T")

RETRY_AFTER = 10.0
"""Seconds after which a retry makes sense: everything that is counted here ends on its own."""


def in_time(
    work: Deferred[T], seconds: float, clock: IReactorTime, late: Callable[[], Exception]
) -> Deferred[T]:
    """Returns ``work``, which is cancelled after ``seconds`` (0 if negative), and then fails
    with ``late``.
    """

    def timed_out(result: T | Failure, _seconds: float) -> T | Failure:
        if isinstance(result, Failure) and result.check(CancelledError):
            raise late()
        return result

    return work.addTimeout(max(0.0, seconds), clock, onTimeoutCancel=timed_out)


class Limit:
    """Allows at most ``most`` of something at a time for each key (an address, a subject); 0 means
    no limit.

    ``what`` completes the reason: "<most> <what> at a time are the limit". Keys that hold nothing
    take no memory.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self._held: dict[str, int] = {}

    def held(self, key: str) -> int:
        """Returns how many the key holds now."""
        return self._held.get(key, 0)

    @property
    def keys(self) -> int:
        """The number of keys that hold any."""
        return len(self._held)

    def take(self, key: str) -> Callable[[], None]:
        """Counts one and returns the function that releases it (idempotent). Raises
        TooManyRequests.
        """
        if self.most and self.held(key) >= self.most:
            raise self.refusal()
        return self.count(key)

    def count(self, key: str) -> Callable[[], None]:
        """Counts one even above the limit; like :meth:`take` otherwise."""
        self._held[key] = self.held(key) + 1
        taken = True

        def release() -> None:
            nonlocal taken
            if not taken:
                return
            taken = False
            left = self._held[key] - 1
            if left:
                self._held[key] = left
            else:
                del self._held[key]

        return release

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Holds one for the length of a block. Raises as :meth:`take` does."""
        release = self.take(key)
        try:
            yield
        finally:
            release()

    def refusal(self) -> TooManyRequests:
        """Returns the error that names the limit."""
        return TooManyRequests(f"{self.most} {self.what} at a time are the limit", RETRY_AFTER)


@dataclass(slots=True)
class _Events:
    count: float
    at: float
    reported: bool = False


class DecayingLimit:
    """Counts events of each key; ``per_second`` of them are forgotten each second.

    A key is above the limit while its count is larger than ``most``. At most one second's events
    are counted above ``most``, so a key is never above the limit for longer than a second without
    a new event. Keys without recent events take no memory.
    """

    MAX_KEYS = 10_000
    """The key with the oldest last event is forgotten beyond this number."""

    def __init__(self, clock: IReactorTime, most: int, per_second: float) -> None:
        self._clock, self._most, self._per_second = clock, most, per_second
        self._largest = most + per_second
        self._keys: ExpiringMap[str, _Events] = ExpiringMap(self.MAX_KEYS, clock.seconds)

    def add(self, key: str) -> bool:
        """Records an event. Returns True for a key's first one above the limit, once until the key
        is forgotten.
        """
        now = self._clock.seconds()
        events = self._keys.get(key) or _Events(0.0, now)
        events.count = min(self._decayed(events, now) + 1, self._largest)
        events.at = now
        self._keys.set(key, events, self._largest / self._per_second)
        first = events.count > self._most and not events.reported
        events.reported = events.reported or first
        return first

    def exceeded(self, key: str) -> bool:
        """Returns whether the key is above the limit now."""
        events = self._keys.get(key)
        return events is not None and self._decayed(events, self._clock.seconds()) > self._most

    def _decayed(self, events: _Events, now: float) -> float:
        return max(0.0, events.count - (now - events.at) * self._per_second)
