"""Delta tags that were given to clients, and the two images behind each.

Kept longer than the deltas: a client that was given a tag must never get a 404 for it
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.refreshed_rows import RefreshedRows

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 3600
"""Seconds for which a recorded tag is not written again."""
MAX_ROWS = 100_000
"""The oldest rows above it are deleted."""


@dataclass(frozen=True, slots=True)
class NamedDelta:
    """The images that a tag in ``target_repository`` was given for. ``base`` and ``target`` are
    digests of manifests.
    """

    target_repository: str
    tag: str
    base_repository: str
    base: Digest
    target: Digest


class NamedDeltas:
    """The table of the delta tags that clients were given, at most ``most`` rows."""

    def __init__(self, database: Database, most: int = MAX_ROWS) -> None:
        self._database = database
        self._rows = RefreshedRows(database, "named_deltas", most, REFRESH_SECONDS)

    async def record(self, named: NamedDelta, now: float) -> None:
        """Records that a client was given a tag, at ``now`` (seconds UTC). Raises Unavailable."""
        row = (
            named.target_repository,
            named.tag,
            named.base_repository,
            named.base.hex,
            named.target.hex,
        )
        await self._rows.write(row, now)

    async def find(self, target_repository: str, tag: str) -> list[NamedDelta]:
        """Returns the images that a tag was given for, latest first: one entry per repository of
        the base.
        """

        def read(connection: sqlite3.Connection) -> list[NamedDelta]:
            rows = connection.execute(
                "SELECT base_repository, base, target FROM named_deltas WHERE target_repository = ?"
                " AND tag = ? ORDER BY last DESC, base_repository",
                (target_repository, tag),
            )
            return [
                NamedDelta(target_repository, tag, repository, Digest(base), Digest(target))
                for repository, base, target in rows
            ]

        return await self._database.read(read)
