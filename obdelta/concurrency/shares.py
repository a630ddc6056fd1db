"""Counts the seconds of slots that each key used: in total against a fair share, and lately.

The accounts behind the build queue (:mod:`obdelta.builds.queue`), which says what they are for.
"""

from __future__ import annotations

from dataclasses import dataclass

from twisted.internet.interfaces import IReactorTime

from obdelta.concurrency.expiring_map import LruMap

HALF_LIFE = 600.0
"""Seconds after which half of a target's use is forgotten."""
MAX_TARGETS = 10_000
"""Targets whose use is remembered; the one used least recently is forgotten first."""


@dataclass(slots=True)
class _Account:
    used: float
    waiting: int = 0
    held: int = 0

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.held)


class Shares:
    """Seconds used by each subject, fleet or target, relative to a fair share of those that are
    active.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._fair = 0.0

    def waiting(self, key: str) -> int:
        """Returns how many of a key wait for a slot."""
        account = self._accounts.get(key)
        return account.waiting if account else 0

    def held(self, key: str) -> int:
        """Returns how many slots a key holds."""
        account = self._accounts.get(key)
        return account.held if account else 0

    def ahead(self, key: str) -> float:
        """Returns the seconds used beyond a fair share."""
        return self._accounts[key].used - self._fair

    def change(self, key: str, *, waiting: int = 0, held: int = 0) -> None:
        """Adds to the numbers of a key."""
        account = self._accounts.get(key)
        if account is None or not account.active:
            self._level()
            account = self._accounts.setdefault(key, _Account(self._fair))
            account.used = max(account.used, self._fair)
        account.waiting += waiting
        account.held += held

    def charge(self, key: str, seconds: float) -> None:
        """Charges an active key for the use of a slot."""
        self._accounts[key].used += seconds
        # Newcomers start at the fair share. It grows with the work, so that they do not pass
        # waiting entries for ever.
        self._fair += seconds / sum(account.active for account in self._accounts.values())

    def _level(self) -> None:
        """Raises the fair share to the least use among those that wait, and forgets idle accounts
        behind it.
        """
        waiting = [account.used for account in self._accounts.values() if account.waiting]
        if waiting:
            self._fair = max(self._fair, min(waiting))
        busy = any(account.active for account in self._accounts.values())
        for key, account in list(self._accounts.items()):
            if not account.active and (not busy or account.used <= self._fair):
                del self._accounts[key]


@dataclass(slots=True)
class _Use:
    seconds: float
    at: float
    """The time for which ``seconds`` holds."""
    number: int
    """Greater than that of every target that was requested earlier."""


class RecentUse:
    """Seconds that builds for each target repository used lately."""

    def __init__(self, clock: IReactorTime, most: int = MAX_TARGETS) -> None:
        self._clock = clock
        self._uses: LruMap[str, _Use] = LruMap(most)
        self._number = 0

    def request(self, target: str) -> None:
        """Notes a target when a build for it is requested."""
        found = self._uses.get(target)
        if found is None:
            self._number += 1
            found = _Use(0.0, self._clock.seconds(), self._number)
        self._uses.set(target, found)

    def charge(self, target: str, seconds: float) -> None:
        """Charges a target for the use of a slot, if it is known."""
        found = self._uses.peek(target)
        if found is not None:
            found.seconds = self._seconds(found) + seconds
            found.at = self._clock.seconds()

    def order(self, target: str) -> tuple[float, int]:
        """Returns the sort key of a target: the smallest goes first."""
        found = self._uses.peek(target)
        return (0.0, 0) if found is None else (self._seconds(found), -found.number)

    def _seconds(self, use: _Use) -> float:
        return float(use.seconds * 0.5 ** ((self._clock.seconds() - use.at) / HALF_LIFE))
