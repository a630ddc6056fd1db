"""Answers that mean "ask again" (502, 504): held back for a set time, and replaced by a full pull
after 15 minutes of refusals.

After a 502 or 504 a supervisor retries within 0.2 to 1 second. It has no back-off and ignores
``Retry-After`` (``docs/wire-protocol.md``). An immediate response would make every device retry
about once a second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request

from obdelta.errors import UpstreamUnavailable

Item = TypeVar("Item", bound=Hashable)


class Lines(Generic[Item]):
    """Items in one queue for each key (a subject, an address): the longest queue loses first. Every
    operation takes constant time.
    """

    def __init__(self) -> None:
        self._key_of: dict[Item, str] = {}
        self._lines: dict[str, dict[Item, None]] = {}
        self._by_length: dict[int, dict[str, None]] = {}
        self._longest = 0

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, item: Item) -> bool:
        return item in self._key_of

    def items(self) -> list[Item]:
        """Returns all items, the oldest first."""
        return list(self._key_of)

    def add(self, key: str, item: Item) -> None:
        """Puts a new item at the end of its key's line."""
        self._key_of[item] = key
        line = self._lines.setdefault(key, {})
        line[item] = None
        self._resized(key, len(line) - 1, len(line))

    def remove(self, item: Item) -> None:
        """Removes an item; does nothing if it is in no line."""
        key = self._key_of.pop(item, None)
        if key is None:
            return
        line = self._lines[key]
        del line[item]
        self._resized(key, len(line) + 1, len(line))
        if not line:
            del self._lines[key]

    def length(self, key: str) -> int:
        """Returns how many items the key has."""
        return len(self._lines.get(key, ()))

    def oldest(self, key: str) -> Item:
        """Returns the first item of a line that has any."""
        return next(iter(self._lines[key]))

    def oldest_of_longest(self) -> Item:
        """Returns the first item of the longest line. Raises KeyError if there is none."""
        return self.oldest(next(iter(self._by_length[self._longest])))

    def _resized(self, key: str, before: int, after: int) -> None:
        if before:
            keys = self._by_length[before]
            del keys[key]
            if not keys:
                del self._by_length[before]
        if after:
            self._by_length.setdefault(after, {})[key] = None
        if after > self._longest or self._longest not in self._by_length:
            self._longest = after


T = TypeVar("T")

JITTER = 0.1
"""The maximum relative deviation of a request's holding time, so that retries of a herd spread."""
MAX_HELD = 10_000
"""Maximum number of responses held at a time."""
REFUSAL_LIMIT = 15 * 60.0
"""Seconds of refusals after which clients are sent a full pull instead of a retry."""
_REFUSAL_LIFETIME = 5 * 60.0
"""Seconds without a refusal after which a pair starts from zero. Clients retry sooner."""
_MAX_PAIRS = 10_000
_MAX_PER_CLIENT = 256


class HeldAnswers:
    """Holds responses for ``seconds`` from the start of their request, plus or minus
    :data:`JITTER`.

    At most ``most`` are held. Beyond that, the client with the most held answers gets its oldest
    one early. There is no limit for one client, because beyond it devices would ask again at once.
    A client that disconnects frees its place.
    """

    def __init__(
        self,
        clock: IReactorTime,
        seconds: float,
        most: int = MAX_HELD,
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

    def seconds_left(self, request: Request) -> float:
        """Returns the seconds until a request should be answered, 0 if its time is over."""
        return max(0.0, self._until.get(request, 0.0) - self._clock.seconds())

    async def wait(self, request: Request, client: str) -> None:
        """Waits until the request's time is over, or its place is needed. Cancelling it frees the
        place. ``client``: a token's subject or an address.
        """
        seconds = self.seconds_left(request)
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
        return await task.addTimeout(
            self.seconds_left(request), self._clock, onTimeoutCancel=_too_slow
        )

    def stop(self) -> None:
        """Answers every held request and holds none from now on, as the server is stopping."""
        self._stopped = True
        for release in self._held.items():
            release.callback(None)


def _too_slow(result: object, _timeout: float) -> Any:
    if isinstance(result, Failure) and result.check(CancelledError):
        raise UpstreamUnavailable("it did not answer in time")
    return result


class RefusedPairs:
    """The pairs that are refused at the moment, each with its first and last refusal.

    A pair counts for the client that was the first to be refused. A client that exceeds
    :data:`_MAX_PER_CLIENT` loses its oldest pair. Beyond :data:`_MAX_PAIRS` in all, the client with
    the most pairs loses its oldest one.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._times: dict[tuple[str, ...], tuple[float, float]] = {}
        self._lines: Lines[tuple[str, ...]] = Lines()

    def refused(self, client: str, *pair: str) -> bool:
        """Records a refusal. Returns whether the pair has been refused for longer than
        :data:`REFUSAL_LIMIT`.
        """
        now = self._clock.seconds()
        first, last = self._times.get(pair, (now, now))
        if now - last > _REFUSAL_LIFETIME:
            first = now
            self.accepted(*pair)
        if pair not in self._lines:
            self._lines.add(client, pair)
        self._times[pair] = (first, now)
        if self._lines.length(client) > _MAX_PER_CLIENT:
            self.accepted(*self._lines.oldest(client))
        elif len(self._lines) > _MAX_PAIRS:
            self.accepted(*self._lines.oldest_of_longest())
        return now - first > REFUSAL_LIMIT

    def accepted(self, *pair: str) -> None:
        """Forgets the refusals of a pair that got another answer."""
        self._times.pop(pair, None)
        self._lines.remove(pair)
