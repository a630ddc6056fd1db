"""Builds that are queued or running, recorded so that a restart resumes them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import Kind


@dataclass(frozen=True, slots=True)
class QueuedBuild:
    """A requested pair. Credentials are never stored. ``since``: seconds UTC."""

    kind: Kind
    base_repository: str
    base: Digest
    target_repository: str
    target: Digest
    since: int


class QueuedBuilds:
    """The table of queued builds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, build: QueuedBuild) -> None:
        """Records a build as waiting. Repeating it is harmless."""

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO queued_builds (kind, base_repository, base, target_repository, target,"
                " since) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    build.kind,
                    build.base_repository,
                    build.base.hex,
                    build.target_repository,
                    build.target.hex,
                    build.since,
                ),
            )

        await self._database.write(insert)

    async def forget(self, kind: Kind, base: Digest, target: Digest) -> None:
        """Deletes a build that has ended, whether it succeeded or failed."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM queued_builds WHERE kind = ? AND base = ? AND target = ?",
                (kind, base.hex, target.hex),
            )

        await self._database.write(delete)

    async def take_up(self, most_starts: int) -> tuple[list[QueuedBuild], int]:
        """At start, returns all builds, oldest first, and counts one more start for each. Also
        returns how many were deleted.

        A build that was started ``most_starts`` times and never ended is deleted: it may have
        crashed the process each time.
        """

        def take(connection: sqlite3.Connection) -> tuple[list[QueuedBuild], int]:
            dropped = connection.execute(
                "DELETE FROM queued_builds WHERE starts >= ?", (most_starts,)
            ).rowcount
            connection.execute("UPDATE queued_builds SET starts = starts + 1")
            rows = connection.execute(
                "SELECT kind, base_repository, base, target_repository, target, since FROM"
                " queued_builds ORDER BY since, rowid"
            )
            found = [
                QueuedBuild(row[0], row[1], Digest(row[2]), row[3], Digest(row[4]), row[5])
                for row in rows
            ]
            return found, dropped

        return await self._database.write(take)
