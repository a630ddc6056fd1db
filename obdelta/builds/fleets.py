"""Fleets of repositories, learned from the updates that clients request; used for fairness only.

Neither tokens nor repository names reveal a fleet: in openBalena each image of each release has a
repository of its own. Base and target of an update are images of one fleet, so the repositories
that updates connect are one fleet here. Access never depends on it.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_REPOSITORIES = 10_000
"""The repository that was requested least recently is forgotten first."""


class Fleets:
    """Names of fleets by repository, in memory."""

    def __init__(self, limit: int = MAX_REPOSITORIES) -> None:
        self._limit = limit
        self._fleet_of: OrderedDict[str, str] = OrderedDict()
        self._members: dict[str, set[str]] = {}

    def of(self, base: str, target: str) -> str:
        """Returns the fleet of both repositories; connects them if they were not."""
        small, large = sorted(
            (self._find(base), self._find(target)), key=lambda name: len(self._members[name])
        )
        if small != large:
            moved = self._members.pop(small)
            self._members[large] |= moved
            self._fleet_of.update(dict.fromkeys(moved, large))
        while len(self._fleet_of) > self._limit:
            repository, fleet = self._fleet_of.popitem(last=False)
            self._members[fleet].discard(repository)
            if not self._members[fleet]:
                del self._members[fleet]
        return large

    def _find(self, repository: str) -> str:
        fleet = self._fleet_of.setdefault(repository, repository)
        self._fleet_of.move_to_end(repository)
        self._members.setdefault(fleet, set()).add(repository)
        return fleet
