"""When to try again, and when to stop."""

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
    """``attempts`` in all, waiting ``first`` seconds, then twice that and so on up to ``most``,
    each shortened by chance to between a half and the whole. A ``Retry-After`` is obeyed up to
    ``honoured`` seconds; one that asks for more ends it. Nothing is tried again later than
    ``patience`` seconds after the first attempt or the last progress.
    """

    attempts: int = 5
    first: float = 0.5
    most: float = 10.0
    honoured: float = 30.0
    patience: float = 90.0


class Tries:
    """The attempts at one thing."""

    def __init__(
        self, backoff: Backoff, clock: IReactorTime, chance: Callable[[], float] = _chance
    ) -> None:
        self._backoff, self._clock, self._chance = backoff, clock, chance
        self.progressed()

    def progressed(self) -> None:
        """What went wrong before counts no longer."""
        self._failures = 0
        self._since = self._clock.seconds()

    async def wait(self, error: TransientUpstreamError | TooManyRequests) -> None:
        """Until the next attempt is due; raises ``error`` where there is to be none."""
        backoff = self._backoff
        self._failures += 1
        asked = error.retry_after or 0.0 if isinstance(error, TooManyRequests) else 0.0
        late = self._clock.seconds() - self._since >= backoff.patience
        if self._failures >= backoff.attempts or late or asked > backoff.honoured:
            raise error
        delay = min(backoff.first * 2 ** (self._failures - 1), backoff.most) * (
            0.5 + self._chance() / 2
        )
        delay = max(delay, asked)
        log.info("{error}; once more in {delay:.1f} s", error=str(error), delay=delay)
        await deferLater(self._clock, delay)

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The operation's result, once an attempt succeeds."""
        while True:
            try:
                return await operation()
            except (TransientUpstreamError, TooManyRequests) as error:
                await self.wait(error)
