"""Tracks pairs of images refused because of load, and for how long."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from obdelta.concurrency.lines import Lines

PATIENCE = 15 * 60.0
"""Seconds of refusals after which clients are sent a full pull instead of a retry."""
_FORGOTTEN = 5 * 60.0
"""Seconds without a refusal after which a pair starts anew. Clients retry within ``hold``."""
_MOST = 10_000
_MOST_OF_CLIENT = 256


class RefusedPairs:
    """The pairs that are refused at the moment, each with its first and last refusal.

    A pair counts for the client that was refused it first. Beyond :data:`_MOST` in all, the longest
    line loses its oldest pair; beyond :data:`_MOST_OF_CLIENT`, that client does.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._times: dict[tuple[str, ...], tuple[float, float]] = {}
        self._lines: Lines[tuple[str, ...]] = Lines()

    def refused(self, client: str, *pair: str) -> bool:
        """Records a refusal. Returns whether the pair has been refused for longer than
        :data:`PATIENCE`.
        """
        now = self._clock.seconds()
        first, last = self._times.get(pair, (now, now))
        if now - last > _FORGOTTEN:
            first = now
            self.accepted(*pair)
        if pair not in self._lines:
            self._lines.add(client, pair)
        self._times[pair] = (first, now)
        if self._lines.length(client) > _MOST_OF_CLIENT:
            self.accepted(*self._lines.oldest(client))
        elif len(self._lines) > _MOST:
            self.accepted(*self._lines.oldest_of_longest())
        return now - first > PATIENCE

    def accepted(self, *pair: str) -> None:
        """Forgets the refusals of a pair that got another answer."""
        self._times.pop(pair, None)
        self._lines.remove(pair)
