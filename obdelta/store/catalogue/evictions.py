"""Deltas whose layers were evicted for the quota: their manifests stay as rows, and their layers
can be rebuilt.

A rebuild needs a recipe that still gives the same bytes, and the effort used
(``details["effort"]``). Deltas that lack either are removed whole. Configs and blobs of up to one
disk block stay: evicting them would free nothing.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, replace

from obdelta.oci import Descriptor, Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import failure_records, fleet_bytes, queries
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import DeltaKey, DeltaRow
from obdelta.store.integrity import manifest_of

MAX_EVICTED = 10_000
"""Maximum number of deltas that are kept without layers; beyond that, the least recently served are
removed.
"""

# ?1: deltas fetched since stay. ?2: the recipe. ?3: deltas built since and never fetched stay. ?4:
# the ids, in JSON, that do not stay. ?5: the latest time that is not ahead of the clock. Pinned
# deltas stay.
_EVICTABLE = """
    (ROW.pinned = 0 AND ((ROW.served > 0 AND NOT ROW.last_served BETWEEN ?1 AND ?5)
        OR (ROW.served = 0 AND NOT ROW.created BETWEEN ?3 AND ?5)
        OR ROW.id IN (SELECT value FROM json_each(?4))))"""
_NEEDED = """EXISTS (
    SELECT 1 FROM manifest_blobs AS theirs JOIN deltas AS other ON other.content = theirs.manifest
    WHERE theirs.blob = layers_here.blob AND NOT GOES)""".replace(
    "GOES", _EVICTABLE.replace("ROW", "other")
)
_NEXT = """
    WHERE (served > 0) = FETCHED AND GOES AND (
        NOT (kind = 'v3' AND recipe = ?2 AND json_extract(details, '$.effort') IS NOT NULL)
        OR EXISTS (
            SELECT 1 FROM layers_here
            WHERE layers_here.manifest = deltas.content AND NOT NEEDED))
    ORDER BY last_served, id LIMIT 1""".replace(
    "GOES", _EVICTABLE.replace("ROW", "deltas")
).replace("NEEDED", _NEEDED)
_WHOLE = """
    WHERE ?2 IS NOT NULL AND GOES ORDER BY served > 0, last_served, id LIMIT 1""".replace(
    "GOES", _EVICTABLE.replace("ROW", "deltas")
)
_COVERED = """
    SELECT 1 FROM deltas WHERE kind = ?6 AND deltas.recipe = ?7 AND base = ?8 AND target = ?9
        AND form = ?10
        AND ?2 IS NOT NULL AND GOES""".replace("GOES", _EVICTABLE.replace("ROW", "deltas"))
MAX_PUBLICATIONS = 256
"""Publications of one evicted blob in one repository that a client's request considers at most."""
_PUBLICATIONS = """
    SELECT deltas.id, publications.base_repository FROM manifest_blobs
    JOIN blobs ON blobs.digest = manifest_blobs.blob AND blobs.evicted = 1
    JOIN deltas ON deltas.kind = 'v3' AND deltas.content = manifest_blobs.manifest
    JOIN publications ON publications.delta = deltas.id AND publications.target_repository = ?
    WHERE manifest_blobs.blob = ? ORDER BY deltas.id DESC, publications.base_repository LIMIT ?"""
_LAYERS_TO_EVICT = """
    SELECT blob, size FROM layers_here
    WHERE manifest = ?6 AND ?2 IS NOT NULL AND NOT NEEDED""".replace("NEEDED", _NEEDED)
_SURPLUS = """
    WHERE pinned = 0 AND last_served < ?1 AND kind = 'v3' AND recipe = ?2
        AND json_extract(details, '$.effort') IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM layers_here WHERE layers_here.manifest = deltas.content)
    ORDER BY last_served DESC, id DESC LIMIT 100 OFFSET ?3"""


@dataclass(frozen=True, slots=True)
class Protection:
    """The deltas that stay: fetched since ``fetched``, or never fetched and built since ``made``
    (seconds UTC).

    Times after ``latest`` protect nothing: the clock was ahead when they were recorded, and their
    age is unknown. The ids in ``exempt`` are not protected. ``recipe``: the current one of v3
    deltas.
    """

    fetched: int
    made: int
    recipe: int
    latest: int
    exempt: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, int, int, str, int]:
        """Returns the parameters for the statements' question marks."""
        return self.fetched, self.recipe, self.made, json.dumps(self.exempt), self.latest

    def covers(self, connection: sqlite3.Connection, key: DeltaKey) -> bool:
        """Returns whether a delta stays."""
        values = (*self.values, *queries.key_values(key))
        return connection.execute(_COVERED, values).fetchone() is None


@dataclass(frozen=True, slots=True)
class Evicted:
    """A delta image with evicted layers.

    ``row`` has the repositories of one of its publications in the requested repository. ``layers``
    are those that are deltas, bottom to top. ``effort`` and ``prices`` (of a command, by form) are
    those that they were built with.
    """

    row: DeltaRow
    layers: tuple[Descriptor, ...]
    effort: str
    prices: dict[str, float]


class Evictions:
    """The catalogue's records of evictions. ``recipe``: the current one of v3 deltas."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def oldest(self, protection: Protection) -> DeltaRow | None:
        """Returns the delta to evict from next: unfetched ones first, then the least recently
        used.
        """
        return await self._database.read(lambda connection: oldest(connection, protection))

    async def oldest_whole(self, protection: Protection) -> DeltaRow | None:
        """Returns the delta to remove next, whether its layers are stored or evicted."""
        return await self._database.read(
            lambda connection: queries.delta(connection, _WHOLE, *protection.values)
        )

    async def excess(self, share: int, before: int, latest: int) -> list[int]:
        """Returns what :func:`obdelta.store.catalogue.fleet_bytes.excess` returns."""
        return await self._database.read(
            lambda connection: fleet_bytes.excess(connection, share, before, latest)
        )

    async def surplus(self, protection: Protection, most: int = MAX_EVICTED) -> list[DeltaKey]:
        """Returns some of the deltas whose rows exceed the number worth keeping."""

        def find(connection: sqlite3.Connection) -> list[DeltaKey]:
            return [
                row.key
                for row in queries.deltas(
                    connection, _SURPLUS, protection.fetched, protection.recipe, most
                )
            ]

        return await self._database.read(find)

    async def evict_layers(self, row: DeltaRow, blobs: BlobStore, protection: Protection) -> int:
        """Evicts the layers of a delta that can be rebuilt; returns the bytes freed. Its manifest
        is served as before.

        A pinned blob is being rebuilt right now, and is stored again when that is published. Raises
        StoreFull.
        """

        def mark(connection: sqlite3.Connection) -> list[tuple[str, int]]:
            found = connection.execute(
                _LAYERS_TO_EVICT, (*protection.values, row.content.hex)
            ).fetchall()
            connection.executemany(
                "UPDATE blobs SET evicted = 1 WHERE digest = ?", [(hex_,) for hex_, _ in found]
            )
            return found

        def discard(connection: sqlite3.Connection) -> int:
            # Under the lock that publishing takes: layers published again in between stay.
            freed = 0
            for hex_, size in marked:
                still = connection.execute(
                    "SELECT evicted FROM blobs WHERE digest = ?", (hex_,)
                ).fetchone()
                if still == (1,) and blobs.discard(Digest(hex_)):
                    freed += size
            return freed

        marked = await self._database.write(mark)
        return await self._database.write(discard)

    async def is_evicted(self, digest: Digest) -> bool:
        """Returns whether a blob was evicted."""

        def find(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "SELECT evicted FROM blobs WHERE digest = ?", (digest.hex,)
            ).fetchone()
            return bool(found == (1,))

        return await self._database.read(find)

    async def of_blob(self, repository: str, digest: Digest) -> list[Evicted]:
        """Returns every way to rebuild an evicted blob of this repository; none if it was not
        evicted.

        One for each delta that has the blob and each of its publications in the repository, the
        newest delta first.
        """

        def find(connection: sqlite3.Connection) -> list[Evicted]:
            rows = connection.execute(
                _PUBLICATIONS, (repository, digest.hex, MAX_PUBLICATIONS)
            ).fetchall()
            return [
                evicted
                for row in rows
                if (evicted := _evicted(connection, repository, *row)) is not None
            ]

        return await self._database.read(find)


def oldest(connection: sqlite3.Connection, protection: Protection) -> DeltaRow | None:
    """See :meth:`Evictions.oldest`."""
    unfetched = queries.delta(connection, _NEXT.replace("FETCHED", "0"), *protection.values)
    return unfetched or queries.delta(connection, _NEXT.replace("FETCHED", "1"), *protection.values)


def _evicted(
    connection: sqlite3.Connection, repository: str, number: int, base_repository: str
) -> Evicted | None:
    row = queries.delta(connection, "WHERE id = ?", number)
    if row is None or "effort" not in row.details:
        return None
    manifest = manifest_of(connection, row.content)
    if manifest is None:
        return None
    here = replace(row, base_repository=base_repository, target_repository=repository)
    layers = manifest.layers[int(row.details["common"]) :]
    return Evicted(here, layers, str(row.details["effort"]), row.details.get("prices", {}))


def evict_lost_layers(
    connection: sqlite3.Connection, blobs: BlobStore, recipe: int
) -> list[DeltaKey]:
    """At start, in a transaction, records damaged or missing layers as evicted, so that they can be
    rebuilt.

    Deletes and returns the deltas for which that is impossible: those of another recipe with
    evicted layers.
    """
    for hex_, size in connection.execute("SELECT DISTINCT blob, size FROM layers_here").fetchall():
        if blobs.size(Digest(hex_)) != size:
            connection.execute("UPDATE blobs SET evicted = 1 WHERE digest = ?", (hex_,))
            blobs.discard(Digest(hex_))
    rest = (
        "WHERE kind = 'v3' AND NOT (recipe = ? AND json_extract(details, '$.effort') IS NOT NULL)"
        " AND EXISTS (SELECT 1 FROM manifest_blobs JOIN blobs ON blobs.digest = manifest_blobs.blob"
        " WHERE manifest = content AND blobs.evicted = 1)"
    )
    retired = [row.key for row in queries.deltas(connection, rest, recipe)]
    for key in retired:
        queries.delete_delta(connection, key)
    return retired


def outdated(connection: sqlite3.Connection, recipe: int, before: int) -> list[DeltaKey]:
    """At start, in a transaction, deletes what an older recipe of the v3 builder left. Returns the
    deltas' keys.

    Failures of an older recipe may be its own faults. Deltas built or served since ``before`` stay:
    devices may be pulling them.
    """
    failure_records.outdated(connection, "v3", recipe)
    rest = "WHERE kind = 'v3' AND recipe < ? AND last_served < ?"
    found = [row.key for row in queries.deltas(connection, rest, recipe, before)]
    for key in found:
        queries.delete_delta(connection, key)
    return found
