"""Rows with the time when something was last seen: rewritten only after a while, and limited."""

from __future__ import annotations

import sqlite3

from obdelta.concurrency.expiring_map import LruMap
from obdelta.errors import Unavailable
from obdelta.store.catalogue.database import Database

_RECENT = 4096


class RefreshedRows:
    """Writes the rows of a table whose last column is ``last``, a time in seconds UTC.

    The same row is written again only after ``seconds``. The oldest rows above ``most`` are
    deleted. ``table`` is a constant of the caller.
    """

    def __init__(self, database: Database, table: str, most: int, seconds: float) -> None:
        self._database, self._table, self._most, self._seconds = database, table, most, seconds
        self._recent: LruMap[tuple[str, ...], float] = LruMap(_RECENT)

    async def write(self, row: tuple[str, ...], now: float) -> None:
        """Writes a row of all columns but the last at ``now``. Raises Unavailable."""
        written = self._recent.get(row)
        if written is not None and 0 <= now - written < self._seconds:
            return
        self._recent.set(row, now)
        places = "?, " * len(row)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"INSERT OR REPLACE INTO {self._table} VALUES ({places}?)",  # noqa: S608 - constants
                (*row, int(now)),
            )
            connection.execute(
                f"DELETE FROM {self._table} WHERE last < (SELECT last FROM {self._table}"  # noqa: S608 - constants
                " ORDER BY last DESC LIMIT 1 OFFSET ?)",
                (self._most - 1,),
            )

        try:
            await self._database.write(write)
        except Unavailable:
            self._recent.pop(row)
            raise
