"""Limits on what one client may hold at a time: counters that raise TooManyRequests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from obdelta.errors import TooManyRequests

RETRY_AFTER = 10.0
"""Seconds after which a retry makes sense: everything that is counted here ends on its own."""


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
        """Holds one for the length of a block. Raises as :meth:`take` does."""
        give_back = self.take(key)
        try:
            yield
        finally:
            give_back()

    def refusal(self) -> TooManyRequests:
        """Returns the error that names the limit."""
        return TooManyRequests(f"{self.most} {self.what} at a time are the limit", RETRY_AFTER)
