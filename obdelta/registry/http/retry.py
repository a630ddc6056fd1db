"""Retries of requests to the upstream: when the next attempt is due, and when to stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from obdelta.errors import TooManyRequests
from obdelta.registry.http.transport import TransientUpstreamError

log = Logger()

T = TypeVar("T")

_chance = SystemRandom().random


@dataclass(frozen=True, slots=True)
class Backoff:
    """The limits of retries.

    ``attempts`` in all. The first wait is ``first`` seconds, then twice that, up to ``most``; each
    is shortened at random to between a half and the whole. A ``Retry-After`` is obeyed up to
    ``max_retry_after`` seconds; a longer one ends the retries. No retry starts later than
    ``time_limit`` seconds after the first attempt or the last progress.
    """

    attempts: int = 5
    first: float = 0.5
    most: float = 10.0
    max_retry_after: float = 30.0
    time_limit: float = 90.0


class Retrier:
    """The attempts at one operation."""

    def __init__(
        self, backoff: Backoff, clock: IReactorTime, chance: Callable[[], float] = _chance
    ) -> None:
        self._backoff, self._clock, self._chance = backoff, clock, chance
        self.progressed()

    def progressed(self) -> None:
        """Resets the count of failures, and restarts the time limit."""
        self._failures = 0
        self._since = self._clock.seconds()

    async def wait(self, error: TransientUpstreamError | TooManyRequests) -> None:
        """Waits until the next attempt is due; raises ``error`` if there is none."""
        backoff = self._backoff
        self._failures += 1
        requested = error.retry_after or 0.0 if isinstance(error, TooManyRequests) else 0.0
        late = self._clock.seconds() - self._since >= backoff.time_limit
        if self._failures >= backoff.attempts or late or requested > backoff.max_retry_after:
            raise error
        delay = min(backoff.first * 2 ** (self._failures - 1), backoff.most) * (
            0.5 + self._chance() / 2
        )
        delay = max(delay, requested)
        log.info("{error}: retry in {delay:.1f} s", error=str(error), delay=delay)
        await deferLater(self._clock, delay)

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Returns the operation's result, once an attempt succeeds."""
        while True:
            try:
                return await operation()
            except (TransientUpstreamError, TooManyRequests) as error:
                await self.wait(error)
