"""Delta tags that were given to clients, and the two images behind each.

Kept longer than the deltas: a client that was given a tag must never get a 404 for it
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from dataclasses import dataclass

from obdelta.errors import Unavailable
from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 3600
"""Seconds for which a recorded tag is not written again."""
MOST_ROWS = 100_000
"""The oldest rows above it are deleted."""
_RECENT = 4096


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
    """The table of given tags in the catalogue's database, at most ``most`` rows."""

    def __init__(self, database: Database, most: int = MOST_ROWS) -> None:
        self._database, self._most = database, most
        self._recent: OrderedDict[NamedDelta, float] = OrderedDict()

    async def record(self, named: NamedDelta, now: float) -> None:
        """Records that a client was given a tag, at ``now`` (seconds UTC). Raises Unavailable."""
        if 0 <= now - self._recent.get(named, -float("inf")) < REFRESH_SECONDS:
            return
        self._recent[named] = now
        self._recent.move_to_end(named)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO named_deltas VALUES (?, ?, ?, ?, ?, ?)",
                (
                    named.target_repository,
                    named.tag,
                    named.base_repository,
                    named.base.hex,
                    named.target.hex,
                    int(now),
                ),
            )
            connection.execute(
                "DELETE FROM named_deltas WHERE last <"
                " (SELECT last FROM named_deltas ORDER BY last DESC LIMIT 1 OFFSET ?)",
                (self._most - 1,),
            )

        try:
            await self._database.write(write)
        except Unavailable:
            self._recent.pop(named, None)
            raise

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
