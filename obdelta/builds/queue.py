"""Who builds next: bounded, and fair between fleets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from twisted.internet.defer import Deferred

from obdelta.errors import QueueFull

_Place = Deferred[Callable[[], None]]


class FairQueue:
    """At most ``slots`` at a time; up to ``most`` wait (0: any number), and fleets take turns, each in its own order.

    A fleet is any string (the target's repository). One that asks for a hundred builds delays another's first by one.
    """

    def __init__(self, slots: int, most: int) -> None:
        self._free, self._most = slots, most
        self._waiting: dict[str, deque[_Place]] = {}
        """In the order of turns: who was served goes to the end."""
        self._count = 0

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return self._count

    def enter(self, fleet: str) -> _Place:
        """Fires with what gives the slot back (once is enough, twice is fine). Cancelling leaves the queue.

        Raises QueueFull at once, before anything was changed.
        """
        if self._free:
            self._free -= 1
            place: _Place = Deferred()
            place.callback(self._slot())
            return place
        if self._most and self._count >= self._most:
            raise QueueFull(self._count)
        place = Deferred(lambda mine: self._leave(fleet, mine))
        self._waiting.setdefault(fleet, deque()).append(place)
        self._count += 1
        return place

    def _leave(self, fleet: str, place: _Place) -> None:
        line = self._waiting[fleet]
        line.remove(place)
        self._count -= 1
        if not line:
            del self._waiting[fleet]

    def _slot(self) -> Callable[[], None]:
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._next()

        return give_back

    def _next(self) -> None:
        fleet = next(iter(self._waiting), None)
        if fleet is None:
            self._free += 1
            return
        line = self._waiting.pop(fleet)
        place = line.popleft()
        self._count -= 1
        if line:
            self._waiting[fleet] = line
        place.callback(self._slot())
