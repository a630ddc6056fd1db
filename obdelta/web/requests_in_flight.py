"""Counts requests in flight, so that a graceful stop can wait for them."""

from __future__ import annotations

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import Request


class InFlight:
    """Counts requests until they end, successfully or not."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Deferred[None]] = []

    def add(self, request: Request) -> None:
        """Counts a request until its response is sent or its client disconnects."""
        self.count += 1
        request.notifyFinish().addBoth(self._ended)

    def _ended(self, _outcome: object) -> None:
        self.count -= 1
        if not self.count:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)

    async def drained(self, seconds: float, clock: IReactorTime) -> bool:
        """Waits up to ``seconds`` until no request is in flight. Returns whether none is left."""
        if self.count and seconds > 0:
            waiter: Deferred[None] = Deferred(self._waiting.remove)
            self._waiting.append(waiter)
            waiter.addTimeout(seconds, clock)
            try:
                await waiter
            except TimeoutError:
                return False
        return not self.count
