"""Tables of what was last seen, and when: images' names, tags given to clients, requested updates.

A row is rewritten only after a while, and the number of rows is limited.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass

from obdelta.concurrency.expiring_map import LruMap
from obdelta.errors import Unavailable
from obdelta.oci import Digest, ImageNames, Reference
from obdelta.store.catalogue.database import Database

KEPT_SECONDS = 86400 * 400
REFRESH_SECONDS = 3600
"""Seconds for which a recorded tag or update is not written again."""
NAMES_REFRESH_SECONDS = 86400
"""The same for the names of an image."""
MAX_ROWS = 100_000
"""The oldest rows of a table above it are deleted: requests must not fill the disk."""
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


class NamedImages:
    """Human names of images by the digest of their manifests, for operators; ``most`` rows."""

    def __init__(self, database: Database, most: int = MAX_ROWS) -> None:
        self._database = database
        self._rows = RefreshedRows(database, "image_names", most, NAMES_REFRESH_SECONDS)

    async def record(self, manifest: Digest, names: ImageNames, now: float) -> None:
        """Records the names of an image at ``now`` (seconds UTC); without names nothing. Raises
        Unavailable.
        """
        if names:
            row = (manifest.hex, names.fleet, names.service, names.release, names.commit)
            await self._rows.write(row, now)

    async def of(self, manifests: Collection[Digest]) -> dict[Digest, ImageNames]:
        """Returns the names of those images that have any. The API's come before those that an
        image states itself: images inherit labels. Raises Unavailable.
        """
        wanted = json.dumps([digest.hex for digest in dict.fromkeys(manifests)])

        def read(connection: sqlite3.Connection) -> dict[Digest, ImageNames]:
            rows = [
                row
                for table in ("image_names", "fleet_images")
                for row in connection.execute(
                    f'SELECT manifest, fleet, service, "release", "commit" FROM {table}'  # noqa: S608
                    " WHERE manifest IN (SELECT value FROM json_each(?)) ORDER BY last",
                    (wanted,),
                )
            ]
            return {Digest(row[0]): ImageNames(*row[1:]) for row in rows}

        return await self._database.read(read) if manifests else {}


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
    """Delta tags that were given to clients, and the images behind each; ``most`` rows at most.

    Kept longer than the deltas: a client that was given a tag must never get a 404 for it
    (``docs/wire-protocol.md``).
    """

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


class UpdateHistory:
    """Updates that devices requested, so that deltas of the next release can be prebuilt; ``most``
    pairs at most.
    """

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
