"""Counters, deltas served per hour, and notes of pulls and downloads, summed up while a write runs,
so that many cost few transactions.

A thousand devices served within a second would otherwise cause a thousand synced writes.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.concurrency.tasks import Waiters
from obdelta.errors import ObdeltaError, Unavailable
from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.device_pulls import (
    Download,
    StartedPull,
    note_downloads,
    note_pulls,
)

log = Logger()

HOUR = 3600
KEPT_HOURS = 24 * 400
"""Rows of served hours are deleted after a year and a month."""
_ADD_TO_HOUR = """
    INSERT INTO hours VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        deltas = deltas + excluded.deltas,
        full_bytes = full_bytes + excluded.full_bytes,
        delta_bytes = delta_bytes + excluded.delta_bytes"""
_REFUSED = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    ArithmeticError,
    ValueError,
)
"""Errors for values that the database does not accept."""


@dataclass(frozen=True, slots=True)
class Served:
    """Totals served from the time ``start`` on (seconds UTC). ``full_bytes``: the bytes of full
    pulls instead.
    """

    start: int
    deltas: int
    full_bytes: int
    delta_bytes: int


@dataclass(frozen=True, slots=True)
class _Increment:
    """One record to write: a delta served ``count`` times, a counter to raise by ``count``, or a
    device's download. ``waiter`` fires when it is written.
    """

    waiter: Deferred[None]
    count: int
    counter: str = ""
    content: Digest | None = None
    time: int = 0
    pull: StartedPull | None = None
    download: Download | None = None


class Counters:
    """Counters and notes of served deltas on their way to the database. Lives on the reactor
    thread.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._notes: list[_Increment] = []
        self._settling: Waiters[None] = Waiters()
        self._writing = False

    def add(self, name: str, amount: int = 1) -> Deferred[None]:
        """Raises a counter. Fires when it has been written."""
        return self._note(_Increment(Deferred(), amount, counter=name))

    async def count(self, name: str, amount: int = 1) -> None:
        """Raises a counter like :meth:`add`, but only logs a failed write."""
        try:
            await self.add(name, amount)
        except Unavailable as error:
            # A full disk is no reason to keep a device from its update.
            log.warn("{name} was not counted: {reason}", name=name, reason=str(error))

    def served(
        self, content: Digest, now: int, pull: StartedPull | None = None, *, times: int = 1
    ) -> Deferred[None]:
        """Records that a device receives a delta's manifest or batch, and the pull that starts with
        it. Fires when they have been written for every delta with this content.

        With ``times`` 0 it announces that serving will start. Await it before the manifest is read:
        the delta is then not removed for the grace period.
        """
        return self._note(_Increment(Deferred(), times, content=content, time=now, pull=pull))

    def downloaded(self, download: Download, now: int) -> Deferred[None]:
        """Records how long a device took for a layer. Fires when it has been written."""
        return self._note(_Increment(Deferred(), 0, time=now, download=download))

    async def all(self) -> dict[str, int]:
        """Returns all counters by name."""
        return await self._database.read(
            lambda connection: dict(connection.execute("SELECT name, value FROM counters"))
        )

    async def served_since(self, since: int, step: int) -> list[Served]:
        """Returns what was served, in steps of ``step`` hours aligned to the epoch; empty steps are
        left out. ``since`` in seconds UTC.
        """

        def read(connection: sqlite3.Connection) -> list[Served]:
            rows = connection.execute(
                "SELECT hour / ?1 * ?1 AS step, sum(deltas), sum(full_bytes), sum(delta_bytes) FROM"
                " hours WHERE hour >= ?2 GROUP BY step ORDER BY step",
                (step, since // HOUR),
            )
            return [Served(hour * HOUR, deltas, full, delta) for hour, deltas, full, delta in rows]

        return await self._database.read(read)

    async def settle(self) -> None:
        """Waits until all earlier notes have been written or have failed."""
        while self._writing:
            await self._settling.wait()

    def _note(self, note: _Increment) -> Deferred[None]:
        self._notes.append(note)
        if not self._writing:
            self._write()
        return note.waiter

    def _write(self) -> None:
        notes, self._notes = self._notes, []
        settling, self._settling = self._settling, Waiters()
        self._writing = True

        def written(failed: dict[int, BaseException] | Failure) -> None:
            self._writing = False
            if self._notes or self._settling:
                self._write()
            for number, note in enumerate(notes):
                if isinstance(failed, Failure):
                    note.waiter.errback(failed)
                elif number in failed:
                    note.waiter.errback(failed[number])
                else:
                    note.waiter.callback(None)
            settling.fire(None)

        Deferred.fromCoroutine(self._write_all(notes)).addBoth(written)

    async def _write_all(self, notes: Sequence[_Increment]) -> dict[int, BaseException]:
        """Writes notes in one transaction; returns the errors of those that cannot be written.

        Clients share a transaction: a note that the database refuses must not fail the others. An
        ObdeltaError is the database's own trouble, and fails all.
        """
        try:
            await self._database.write(lambda connection: _write(connection, notes))
        except ObdeltaError:
            raise
        except Exception as error:
            log.warn(
                "counts cannot be written in one transaction: {reason}: each is tried alone",
                reason=f"{type(error).__name__}: {error}",
            )
            return await self._database.write(lambda connection: _write_each(connection, notes))
        return {}


def _write_each(
    connection: sqlite3.Connection, notes: Sequence[_Increment]
) -> dict[int, BaseException]:
    failed: dict[int, BaseException] = {}
    for number, note in enumerate(notes):
        connection.execute("SAVEPOINT note")
        try:
            _write(connection, [note])
        except _REFUSED as error:
            connection.execute("ROLLBACK TO note")
            failed[number] = error
        connection.execute("RELEASE note")
    return failed


def _write(connection: sqlite3.Connection, notes: Sequence[_Increment]) -> None:
    served: dict[Digest, tuple[int, int]] = {}
    counters: Counter[str] = Counter()
    pulls: list[tuple[Digest, StartedPull]] = []
    downloads: list[tuple[Download, int]] = []
    for note in notes:
        if note.download is not None:
            downloads.append((note.download, note.time))
            continue
        if note.content is None:
            counters[note.counter] += note.count
            continue
        count, last = served.get(note.content, (0, note.time))
        served[note.content] = (count + note.count, max(last, note.time))
        if note.pull is not None:
            pulls.append((note.content, note.pull))
    if served:
        connection.executemany(
            "UPDATE deltas SET served = served + ?, last_served = max(last_served, ?)"
            " WHERE content = ?",
            [(count, last, content.hex) for content, (count, last) in served.items()],
        )
        counters.update(
            _note_served(
                connection, [(content, count, last) for content, (count, last) in served.items()]
            )
        )
    if pulls:
        note_pulls(connection, pulls)
    if downloads:
        note_downloads(connection, downloads)
    connection.executemany(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value"
        " + excluded.value",
        list((+counters).items()),
    )


def _note_served(
    connection: sqlite3.Connection, served: Iterable[tuple[Digest, int, int]]
) -> dict[str, int]:
    """Records contents, how often each was served, and when last. Returns the increments of
    counters.
    """
    counters: dict[str, int] = {}
    for content, count, now in served:
        found = connection.execute(
            "SELECT kind, form, full_bytes, delta_bytes FROM deltas WHERE content = ? LIMIT 1",
            (content.hex,),
        ).fetchone()
        if found is None:
            continue
        kind, form, full, delta = found
        connection.execute(_ADD_TO_HOUR, (now // HOUR, kind, count, count * full, count * delta))
        raised = {
            f"served.{kind}.deltas": count,
            f"served.{kind}.full_bytes": count * full,
            f"served.{kind}.delta_bytes": count * delta,
        }
        if kind == "v3":
            raised[f"form.{form}"] = count
        for name, amount in raised.items():
            counters[name] = counters.get(name, 0) + amount
    return counters
