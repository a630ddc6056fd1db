"""Updates that devices requested, from which image to which, so that deltas of the next release can
be prebuilt.
"""

from __future__ import annotations

import sqlite3

from obdelta.oci import Digest, Reference
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.refreshed_rows import RefreshedRows

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 3600
"""Seconds for which a recorded pair is not written again."""
MAX_ROWS = 100_000
"""Beyond this the oldest are deleted: requests must not fill the disk."""


class UpdateHistory:
    """The table of requested updates in the catalogue's database, at most ``most`` pairs."""

    def __init__(self, database: Database, most: int = MAX_ROWS) -> None:
        self._database = database
        self._rows = RefreshedRows(database, "asked", most, REFRESH_SECONDS)

    async def note(self, base: Reference, target: Reference, now: float) -> None:
        """Records that a device that runs ``base`` requested ``target`` at ``now`` (seconds since
        the epoch). Raises Unavailable.
        """
        await self._rows.write((target.repository, base.repository, _selector(base)), now)

    async def bases(self, target_repository: str, count: int) -> list[Reference]:
        """Returns the images from which devices requested updates to a repository, latest first,
        each repository once.
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
        """Returns the images that devices ran or were updated to, for any target; latest first,
        each repository once.
        """

        def read(connection: sqlite3.Connection) -> list[Reference]:
            # A device now runs the image it was updated to, so that one ranks before the base.
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
