"""Work that ran over its time, keyed by layer contents, so that a new manifest over the same layers
does not repeat it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database

MEMORY_SECONDS = 86400
"""Seconds until it is forgotten: by then a quieter machine or another version may succeed."""


def work_key(work: str, *images: Iterable[Digest]) -> Digest:
    """Returns the key of a kind of work on the layers of images, bottom to top."""
    lines = [work, *("layers " + " ".join(map(str, layers)) for layers in images)]
    return Digest.of("\n".join(lines).encode())


class SlowWork:
    """The table of such work. Times are seconds UTC."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def remember(self, key: Digest, reason: str, now: int) -> None:
        """Records that work ran over its time."""

        def note(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO slow_work VALUES (?, ?, ?)", (key.hex, reason, now)
            )

        await self._database.write(note)

    async def reason(self, key: Digest, now: int) -> str | None:
        """Returns how the work failed, or None if no row remembers it."""

        def find(connection: sqlite3.Connection) -> str | None:
            row = connection.execute(
                "SELECT reason FROM slow_work WHERE key = ? AND last > ?",
                (key.hex, now - MEMORY_SECONDS),
            ).fetchone()
            return None if row is None else str(row[0])

        return await self._database.read(find)

    async def forget(self, failure: str) -> None:
        """Deletes the records of work whose reason is contained in a failure's, so that it is tried
        again.

        Other work that ended for the same reason is tried again, too.
        """
        await self._database.write(
            lambda connection: connection.execute(
                "DELETE FROM slow_work WHERE instr(?, reason)", (failure,)
            )
        )
