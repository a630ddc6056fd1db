"""Removal of deltas; at the start of the server also of rows whose files are missing, and of files
without a row.

Everything here runs in the database's thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable

from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import queries
from obdelta.store.catalogue.evictions import Protection, evict_lost_layers, outdated
from obdelta.store.catalogue.records import DeltaKey


def remove_rows(
    connection: sqlite3.Connection, keys: Iterable[DeltaKey], unless: Protection | None
) -> list[Digest]:
    """Deletes the rows of deltas that ``unless`` does not protect. Returns the blobs that they
    needed.
    """
    parts: list[Digest] = []
    for key in keys:
        row = queries.find(connection, key)
        if row is None or (unless is not None and unless.covers(connection, key)):
            continue
        parts += queries.blobs_of(connection, row)
        queries.delete_delta(connection, key)
        queries.delete_if_unused(connection, row.content)
    return parts


def remove_broken(
    connection: sqlite3.Connection, blobs: BlobStore, recipe: int | None, before: int
) -> list[DeltaKey]:
    """Deletes deltas with damaged or missing files and, with ``recipe``, outdated ones. Returns
    their keys.
    """
    gone = (
        []
        if recipe is None
        else evict_lost_layers(connection, blobs, recipe) + outdated(connection, recipe, before)
    )
    stored = connection.execute("SELECT digest, size FROM blobs WHERE evicted = 0")
    known = [(Digest(hex_), size) for hex_, size in stored]
    broken = [digest for digest, size in known if blobs.size(digest) != size]
    rows = [row for digest in broken for row in queries.deltas_with_blob(connection, digest)]
    keys = list(dict.fromkeys(row.key for row in rows))
    for key in keys:
        queries.delete_delta(connection, key)
    queries.delete_unused_manifests(connection)
    return gone + keys


def files_without_row(
    connection: sqlite3.Connection, blobs: BlobStore, keep: frozenset[Digest]
) -> list[Digest]:
    """Returns the digests of files, except ``keep``, that have no row."""
    known = {hex_ for (hex_,) in connection.execute("SELECT digest FROM blobs")} | {
        digest.hex for digest in keep
    }
    return [digest for digest in blobs.digests() if digest.hex not in known]


def remove_orphans(
    connection: sqlite3.Connection,
    blobs: BlobStore,
    keep: frozenset[Digest],
    without_row: Collection[Digest],
) -> int:
    """Removes files that no delta needs, except ``keep`` and pinned ones: evicted ones, and those
    of ``without_row``. Returns how many.
    """
    queries.discard_unreferenced(connection, blobs)
    known = dict(connection.execute("SELECT digest, evicted FROM blobs"))
    removable = [
        digest
        for digest in blobs.digests()
        if known.get(digest.hex, digest in without_row) and digest not in keep
    ]
    return sum(blobs.discard(digest) for digest in removable)
