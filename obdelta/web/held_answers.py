"""Holds responses that mean "ask again" until their client has waited for a set time.

After a 502 or 504 a supervisor retries within 0.2 to 1 second. It has no back-off and ignores
``Retry-After`` (``docs/wire-protocol.md``). An immediate response would make every device retry
about once a second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request

from obdelta.concurrency.lines import Lines
from obdelta.errors import UpstreamUnavailable

T = TypeVar("T")

JITTER = 0.1
"""The maximum relative deviation of a request's holding time, so that retries of a herd spread."""
MOST = 10_000
"""Maximum number of responses held at a time."""


class HeldAnswers:
    """Holds responses for ``seconds`` from the start of their request, plus or minus
    :data:`JITTER`.

    Each client has a line of its own. Beyond ``most`` in all, the oldest answer of the longest line
    is sent early. A client has no bound of its own: its devices would then ask again at once. One
    that disconnects frees its place.
    """

    def __init__(
        self,
        clock: IReactorTime,
        seconds: float,
        most: int = MOST,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock, self._seconds, self._most, self._uniform = clock, seconds, most, uniform
        self._until: dict[Request, float] = {}
        self._held: Lines[Deferred[None]] = Lines()
        self._stopped = False

    @property
    def count(self) -> int:
        """Returns the number of responses held."""
        return len(self._held)

    def begin(self, request: Request) -> None:
        """Starts the request's time. Must be called once, before anything else."""
        factor = self._uniform(1 - JITTER, 1 + JITTER)
        self._until[request] = self._clock.seconds() + self._seconds * factor
        request.notifyFinish().addBoth(lambda _: self._until.pop(request))

    def left(self, request: Request) -> float:
        """Returns the seconds until a request should be answered, 0 if its time is over."""
        return max(0.0, self._until.get(request, 0.0) - self._clock.seconds())

    async def wait(self, request: Request, client: str) -> None:
        """Waits until the request's time is over, or its place is needed. Cancelling it frees the
        place. ``client``: a token's subject or an address.
        """
        seconds = self.left(request)
        if self._stopped or not seconds:
            return
        release: Deferred[None] = Deferred()
        self._held.add(client, release)
        timer = self._clock.callLater(seconds, release.callback, None)
        if len(self._held) > self._most:
            self._held.oldest_of_longest().callback(None)
        try:
            await release
        finally:
            self._held.remove(release)
            if timer.active():
                timer.cancel()

    async def within(self, request: Request, work: Coroutine[Deferred[Any], Any, T]) -> T:
        """Returns the result of ``work`` if it finishes within the request's time. Otherwise
        cancels it and raises UpstreamUnavailable.
        """
        task: Deferred[T] = Deferred.fromCoroutine(work)
        return await task.addTimeout(self.left(request), self._clock, onTimeoutCancel=_too_slow)

    def stop(self) -> None:
        """Answers every held request and holds none from now on, as the server is stopping."""
        self._stopped = True
        for release in self._held.items():
            release.callback(None)


def _too_slow(result: object, _timeout: float) -> Any:
    if isinstance(result, Failure) and result.check(CancelledError):
        raise UpstreamUnavailable("it did not answer in time")
    return result
