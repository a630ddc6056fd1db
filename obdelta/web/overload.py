"""Tracks pairs of images refused because of load, and for how long."""

from __future__ import annotations

from collections import OrderedDict

from twisted.internet.interfaces import IReactorTime

PATIENCE = 15 * 60.0
"""Seconds of refusals after which clients are sent a full pull instead of a retry."""
_FORGOTTEN = 5 * 60.0
"""Seconds without a refusal after which a pair starts anew. Clients retry within ``hold``."""
_MOST = 10_000


class RefusedPairs:
    """The pairs that are currently refused, each with its first and last refusal. Bounded."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._pairs: OrderedDict[tuple[str, ...], tuple[float, float]] = OrderedDict()

    def refused(self, *pair: str) -> bool:
        """Records a refusal. Returns whether the pair has been refused for longer than
        :data:`PATIENCE`.
        """
        now = self._clock.seconds()
        first, last = self._pairs.pop(pair, (now, now))
        if now - last > _FORGOTTEN:
            first = now
        self._pairs[pair] = (first, now)
        if len(self._pairs) > _MOST:
            self._pairs.popitem(last=False)
        return now - first > PATIENCE

    def accepted(self, *pair: str) -> None:
        """Forgets the refusals of a pair that received another answer."""
        self._pairs.pop(pair, None)
