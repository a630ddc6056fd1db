"""From which images devices asked, towards which: kept, so that the next release can be prepared
for those who wait for it.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict

from obdelta.errors import Unavailable
from obdelta.oci import Digest, Reference
from obdelta.store.catalogue.database import Database

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 3600
"""A pair that was noted so recently is not written down again."""
MOST_ROWS = 100_000
"""Of more, the oldest go: whoever may ask must not fill the disk with it."""
_RECENT = 4096


class UpdateHistory:
    """In the catalogue's database, ``most`` pairs."""

    def __init__(self, database: Database, most: int = MOST_ROWS) -> None:
        self._database, self._most = database, most
        self._noted: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    async def note(self, base: Reference, target: Reference, now: float) -> None:
        """A device that runs ``base`` asked for ``target``, at ``now`` (seconds since the epoch).
        Raises Unavailable.
        """
        key = (target.repository, base.repository, _selector(base))
        if 0 <= now - self._noted.get(key, -float("inf")) < REFRESH_SECONDS:
            return
        self._noted[key] = now
        self._noted.move_to_end(key)
        while len(self._noted) > _RECENT:
            self._noted.popitem(last=False)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?, ?)", (*key, int(now)))
            connection.execute("DELETE FROM asked WHERE last < ?", (int(now) - KEPT_SECONDS,))
            connection.execute(
                "DELETE FROM asked WHERE last < (SELECT last FROM asked ORDER BY last DESC LIMIT 1"
                " OFFSET ?)",
                (self._most - 1,),
            )

        try:
            await self._database.write(write)
        except Unavailable:
            del self._noted[key]
            raise

    async def bases(self, target_repository: str, count: int) -> list[Reference]:
        """The images from which devices asked for what lies in a repository, the latest first, each
        repository once.
        """

        def read(connection: sqlite3.Connection) -> list[Reference]:
            rows = connection.execute(
                "SELECT base_repository, base, max(last) FROM asked WHERE target_repository = ?"
                " GROUP BY base_repository ORDER BY 3 DESC, 1 LIMIT ?",
                (target_repository, count),
            )
            return [_reference(repository, selector) for repository, selector, _ in rows]

        return await self._database.read(read)

    async def running(self, count: int) -> list[Reference]:
        """The images that devices asked from, and those that they were led to, towards whatever;
        the latest first, each repository once.
        """

        def read(connection: sqlite3.Connection) -> list[Reference]:
            # What a device was led to is what it runs now: before what it came from.
            rows = connection.execute(
                "SELECT repository, selector, max(rank) FROM ( SELECT base_repository AS"
                " repository, base AS selector, 2 * last AS rank FROM asked UNION ALL SELECT"
                " target_repository, '', 2 * max(last) + 1 FROM asked GROUP BY target_repository)"
                " GROUP BY repository ORDER BY 3 DESC, 1 LIMIT ?",
                (count,),
            )
            return [_reference(repository, selector) for repository, selector, _ in rows]

        return await self._database.read(read)


def _selector(reference: Reference) -> str:
    return str(reference.digest) if reference.digest is not None else reference.tag or ""


def _reference(repository: str, selector: str) -> Reference:
    if selector.startswith("sha256:"):
        return Reference("", repository, digest=Digest.parse(selector))
    return Reference("", repository, tag=selector or None)
