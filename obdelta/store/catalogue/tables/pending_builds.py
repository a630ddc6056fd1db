"""Builds that are queued or running, recorded so that a restart resumes them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from obdelta.oci import Digest, Form
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import Kind


@dataclass(frozen=True, slots=True)
class PendingBuild:
    """A requested pair. ``since``: seconds UTC. ``form``: the first one that the build makes.

    Credentials are never stored.
    """

    kind: Kind
    base_repository: str
    base: Digest
    target_repository: str
    target: Digest
    since: int
    form: Form = Form.UNIVERSAL


class PendingBuilds:
    """The table of queued builds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, build: PendingBuild) -> None:
        """Records a build as waiting. Repeating it is harmless."""

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO queued_builds (kind, base_repository, base, target_repository, target,"
                " form, since) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    build.kind,
                    build.base_repository,
                    build.base.hex,
                    build.target_repository,
                    build.target.hex,
                    build.form.value,
                    build.since,
                ),
            )

        await self._database.write(insert)

    async def forget(self, build: PendingBuild) -> None:
        """Deletes a build that has ended, whether it succeeded or failed."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM queued_builds WHERE kind = ? AND base = ? AND target = ? AND form = ?",
                (build.kind, build.base.hex, build.target.hex, build.form.value),
            )

        await self._database.write(delete)

    async def forget_all(self) -> None:
        """Deletes all builds, if another machine has their queue."""
        await self._database.write(
            lambda connection: connection.execute("DELETE FROM queued_builds")
        )

    async def take_all(self, max_starts: int) -> tuple[list[PendingBuild], int]:
        """At start, returns all builds, oldest first, and counts one more start for each. Also
        returns how many were deleted.

        A build that was started ``max_starts`` times and never ended is deleted: it may have
        crashed the process each time.
        """

        def take(connection: sqlite3.Connection) -> tuple[list[PendingBuild], int]:
            dropped = connection.execute(
                "DELETE FROM queued_builds WHERE starts >= ?", (max_starts,)
            ).rowcount
            connection.execute("UPDATE queued_builds SET starts = starts + 1")
            rows = connection.execute(
                "SELECT kind, base_repository, base, target_repository, target, since, form FROM"
                " queued_builds ORDER BY since, rowid"
            )
            found = [
                PendingBuild(
                    row[0], row[1], Digest(row[2]), row[3], Digest(row[4]), row[5], Form(row[6])
                )
                for row in rows
            ]
            return found, dropped

        return await self._database.write(take)
