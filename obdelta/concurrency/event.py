"""Events: any number of coroutines wait for one, and each wait can be cancelled alone."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

T = TypeVar("T")


class Waiters(Generic[T]):
    """The waits for the next time that something happens. It may happen many times."""

    def __init__(self) -> None:
        self._waiting: dict[Deferred[T], None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self) -> Deferred[T]:
        """Returns a Deferred that fires the next time. Cancelling it ends this wait only."""
        waiter: Deferred[T] = Deferred(lambda waiter: self._waiting.pop(waiter, None))
        self._waiting[waiter] = None
        return waiter

    def fire(self, outcome: T | Failure) -> None:
        """Ends the waits that have begun. Waits that begin meanwhile are for the next time."""
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting:
            if not waiter.called:  # cancelled by one that fired before it
                waiter.callback(outcome)


class Event:
    """Something that happens once. Waits that begin later end at once."""

    def __init__(self) -> None:
        self._waiters: Waiters[None] = Waiters()
        self.happened = False

    @property
    def waiting(self) -> int:
        """The number of waits that have not ended."""
        return len(self._waiters)

    def wait(self) -> Deferred[None]:
        """Returns a Deferred that fires once the event has happened. Cancelling it ends this wait
        only.
        """
        return succeed(None) if self.happened else self._waiters.wait()

    def fire(self) -> None:
        """Makes the event happen. Without effect if it has happened."""
        self.happened = True
        self._waiters.fire(None)
