"""Pulls that began with a valid token, so that a slow pull may continue after its token expires.

Stored in the database: a restart must not end a pull, and several server processes share it. Tokens
and subjects are kept as hashes.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from obdelta.oci import Digest
from obdelta.store.catalogue.database import Database

MAX_PER_SUBJECT = 32
"""Pulls of one subject; beyond that, those that end first are deleted."""
MAX_ROWS = 100_000
LATEST = 10**11
"""The latest end of a pull that is stored: later ones are set to it, as SQLite's numbers end."""


@dataclass(frozen=True, slots=True)
class StartedPull:
    """A pull with its token as a hash. ``until``: seconds UTC, when even the expired token ends."""

    token: str
    subject: str
    repository: str
    until: int


class StartedPulls:
    """The table of started pulls."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def includes(
        self, token: str, subject: str, repository: str, blob: Digest, now: float
    ) -> bool:
        """Returns whether this token of this subject fetched a manifest there that names the
        blob.
        """

        def read(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "SELECT 1 FROM started_pulls JOIN manifest_blobs ON manifest_blobs.manifest ="
                " started_pulls.manifest WHERE token = ? AND subject = ? AND repository = ? AND"
                " blob = ? AND until > ? LIMIT 1",
                (token, _hash(subject), repository, blob.hex, int(now)),
            )
            return found.fetchone() is not None

        return await self._database.read(read)


def note(connection: sqlite3.Connection, pulls: Iterable[tuple[Digest, StartedPull]]) -> None:
    """Records pulls, and deletes those above the limits. Runs in the database's thread."""
    subjects = set()
    for manifest, pull in pulls:
        subject = _hash(pull.subject)
        subjects.add(subject)
        connection.execute(
            "INSERT OR REPLACE INTO started_pulls VALUES (?, ?, ?, ?, ?)",
            (pull.token, manifest.hex, pull.repository, subject, min(pull.until, LATEST)),
        )
    if not subjects:
        return
    for subject in subjects:
        connection.execute(
            "DELETE FROM started_pulls WHERE subject = ?1 AND (token, manifest, repository) IN"
            " (SELECT token, manifest, repository FROM started_pulls WHERE subject = ?1"
            " ORDER BY until DESC LIMIT -1 OFFSET ?2)",
            (subject, MAX_PER_SUBJECT),
        )
    connection.execute(
        "DELETE FROM started_pulls WHERE until < (SELECT until FROM started_pulls ORDER BY until"
        " DESC LIMIT 1 OFFSET ?)",
        (MAX_ROWS - 1,),
    )


def _hash(subject: str) -> str:
    return hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()
