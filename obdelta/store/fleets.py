"""Fleets of repositories, learned from the updates that clients request; never used for access.

Neither tokens nor repository names reveal a fleet: in openBalena each image of each release has a
repository of its own. Base and target of an update are often images of one fleet, so an update
connects their repositories. Fair shares, learned prices and lists of deltas depend on it; access
never does.

A public image can be the base or the target of anybody's update. Therefore two fleets never become
one, and no repository joins a fleet because it was the base of an update there. Only the first
update of all makes its base a member.
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
        self._bases: set[str] = set()
        """Repositories that were a base for a fleet that they had not joined as a target. They
        bring no new target into a fleet, except as its founder.
        """
        self._founders: dict[str, str] = {}
        """By fleet, the one base of all its updates so far. It may bring in new targets."""

    def of(self, base: str, target: str) -> str:
        """Returns the target's fleet. Connects the base's repository with it if that is safe."""
        base_fleet, target_fleet = self._find(base), self._find(target)
        if base != target:
            self._connect(base, base_fleet, target, target_fleet)
        while len(self._fleet_of) > self._limit:
            self._forget_oldest()
        return self._fleet_of.get(target, target)

    def fleet(self, target: str, base: str = "") -> str:
        """Returns the fleet of one repository. Connects nothing.

        A repository without a fleet gets the one that it would join by an update from ``base``.
        """
        found = self._fleet_of.get(target)
        if found is None and base in self._fleet_of:
            fleet = self._fleet_of[base]
            if base not in self._bases or self._founders.get(fleet) == base:
                return fleet
        return target if found is None else found

    def _connect(self, base: str, base_fleet: str, target: str, target_fleet: str) -> None:
        if base_fleet == target_fleet:
            self._record_base(target_fleet, base)
            return
        base_is_alone, target_is_alone = (
            len(self._members[one]) == 1 for one in (base_fleet, target_fleet)
        )
        if not target_is_alone:
            # Two fleets stay two. A base of several fleets is public.
            self._bases.add(base)
            self._record_base(target_fleet, base)
            if self._founders.get(base_fleet) == base:
                del self._founders[base_fleet]
        elif base_is_alone and base not in self._bases:
            self._bases.add(base)
            self._move(base, base_fleet, target_fleet)
            self._founders[target_fleet] = base
        elif base not in self._bases or self._founders.get(base_fleet) == base:
            self._move(target, target_fleet, base_fleet)
            self._record_base(base_fleet, base)

    def _record_base(self, fleet: str, base: str) -> None:
        """The founder loses its part as soon as a fleet has an update from another base."""
        if self._founders.get(fleet, base) != base:
            del self._founders[fleet]

    def _move(self, repository: str, source: str, destination: str) -> None:
        del self._members[source]
        self._founders.pop(source, None)
        self._members[destination].add(repository)
        self._fleet_of[repository] = destination

    def _find(self, repository: str) -> str:
        fleet = self._fleet_of.setdefault(repository, repository)
        self._fleet_of.move_to_end(repository)
        self._members.setdefault(fleet, set()).add(repository)
        return fleet

    def _forget_oldest(self) -> None:
        repository, fleet = self._fleet_of.popitem(last=False)
        self._bases.discard(repository)
        if self._founders.get(fleet) == repository:
            del self._founders[fleet]
        self._members[fleet].discard(repository)
        if not self._members[fleet]:
            del self._members[fleet]
            self._founders.pop(fleet, None)
