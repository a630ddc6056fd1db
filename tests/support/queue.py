"""Builds in a queue, on a clock of the test."""

from __future__ import annotations

from collections import deque

from twisted.internet.task import Clock
from twisted.python.failure import Failure

from obdelta.builds.queue import Entry, FairQueue, Owner, Priority, Release
from obdelta.errors import QueueFull


def owner(subject: str, fleet: str = "", priority: Priority = Priority.DEVICE) -> Owner:
    return Owner(subject, fleet or subject, priority)


class Builds:
    """A queue whose builds the test ends. ``started``: the owners in the order of their starts."""

    def __init__(self, slots: int, most: int = 0) -> None:
        self.clock = Clock()
        self.queue = FairQueue(slots, most, self.clock)
        self.started: list[Owner] = []
        self.running: deque[Release] = deque()
        self.evicted: list[Owner] = []

    def enter(self, who: Owner) -> Entry:
        entry = self.queue.enter(who)
        entry.place.addCallbacks(
            lambda release: self._begin(entry, release), lambda why: self._leave(who, why)
        )
        return entry

    def _begin(self, entry: Entry, release: Release) -> None:
        self.started.append(entry.owner)
        self.running.append(release)

    def _leave(self, who: Owner, why: Failure) -> None:
        why.trap(QueueFull)
        self.evicted.append(who)

    def finish(self, seconds: float = 0.0) -> None:
        """Ends the oldest running build."""
        self.clock.advance(seconds)
        self.running.popleft()()

    def finish_all(self, seconds: float = 0.0) -> list[str]:
        while self.running:
            self.finish(seconds)
        return [who.subject for who in self.started]
