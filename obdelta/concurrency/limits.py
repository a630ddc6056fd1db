"""What one client may have at a time: counters that refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from obdelta.errors import TooManyRequests

RETRY_AFTER = 10.0
"""Seconds after which it is worth asking again: what is counted here ends on its own."""


class Limit:
    """At most ``most`` of something at a time for each key (an address, a subject); 0 means any
    number.

    ``what`` completes the reason: "<most> <what> at a time are the limit". Keys that hold nothing
    take no memory.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self._held: dict[str, int] = {}

    def held(self, key: str) -> int:
        """How many the key has now."""
        return self._held.get(key, 0)

    @property
    def keys(self) -> int:
        """How many keys have any."""
        return len(self._held)

    def take(self, key: str) -> Callable[[], None]:
        """Count one; what is returned gives it back (calling it again does nothing). Raises
        TooManyRequests.
        """
        if self.most and self.held(key) >= self.most:
            raise self.refusal()
        return self.count(key)

    def count(self, key: str) -> Callable[[], None]:
        """Count one even above the limit; like :meth:`take` otherwise."""
        self._held[key] = self.held(key) + 1
        taken = True

        def give_back() -> None:
            nonlocal taken
            if not taken:
                return
            taken = False
            left = self._held[key] - 1
            if left:
                self._held[key] = left
            else:
                del self._held[key]

        return give_back

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """:meth:`take` for the length of a block."""
        give_back = self.take(key)
        try:
            yield
        finally:
            give_back()

    def refusal(self) -> TooManyRequests:
        """The error that says so."""
        return TooManyRequests(f"{self.most} {self.what} at a time are the limit", RETRY_AFTER)
