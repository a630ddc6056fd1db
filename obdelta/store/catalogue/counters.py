"""Counters and notes of served deltas, summed up while a write runs, so that many cost few
transactions.

A thousand devices served within a second would otherwise cause a thousand synced writes.
"""

from __future__ import annotations

import sqlite3
from collections import Counter

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from obdelta.oci import Digest
from obdelta.store.catalogue import history, started_pulls
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.started_pulls import StartedPull


class Tallies:
    """Counters and notes of served deltas on their way to the database. Lives on the reactor
    thread.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._served: dict[Digest, tuple[int, int]] = {}
        self._counters: Counter[str] = Counter()
        self._pulls: list[tuple[Digest, StartedPull]] = []
        self._waiting: list[Deferred[None]] = []
        self._writing = False

    def add(self, name: str, amount: int) -> Deferred[None]:
        """Raises a counter. Fires when it has been written."""
        self._counters[name] += amount
        return self._note()

    def served(
        self, content: Digest, now: int, pull: StartedPull | None = None, *, times: int = 1
    ) -> Deferred[None]:
        """Records a served content. Fires when time, count and started pull have been written for
        every delta with this content.
        """
        if pull is not None:
            self._pulls.append((content, pull))
        count, last = self._served.get(content, (0, now))
        self._served[content] = (count + times, max(last, now))
        return self._note()

    async def settle(self) -> None:
        """Waits until all earlier notes have been written or have failed."""
        while self._writing:
            waiter: Deferred[None] = Deferred()
            self._waiting.append(waiter)
            waiter.addErrback(lambda _failure: None)  # the caller that added it got the error
            await waiter

    def _note(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        if not self._writing:
            self._write()
        return waiter

    def _write(self) -> None:
        served, self._served = self._served, {}
        counters, self._counters = self._counters, Counter()
        pulls, self._pulls = self._pulls, []
        waiting, self._waiting = self._waiting, []
        self._writing = True

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "UPDATE deltas SET served = served + ?, last_served = max(last_served, ?) WHERE"
                " content = ?",
                [(count, last, content.hex) for content, (count, last) in served.items()],
            )
            raised = history.note(
                connection, [(content, count, last) for content, (count, last) in served.items()]
            )
            started_pulls.note(
                connection, pulls, max((last for _, last in served.values()), default=0)
            )
            connection.executemany(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value"
                " + excluded.value",
                list((counters + Counter(raised)).items()),
            )

        def written(failure: Failure | None) -> None:
            self._writing = False
            if self._waiting:
                self._write()
            for waiter in waiting:
                if failure is None:
                    waiter.callback(None)
                else:
                    waiter.errback(failure)

        Deferred.fromCoroutine(self._database.write(write)).addBoth(written)
