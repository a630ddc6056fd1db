"""Checks whether a delta can be served, and repairs it: manifest and blobs, in the catalogue and on
the disk.

Everything here runs in the database's thread. A check costs one ``stat`` per blob.
"""

from __future__ import annotations

import sqlite3

from obdelta.oci import Descriptor, Digest, Manifest, parse_manifest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import queries
from obdelta.store.catalogue.records import DeltaRow


def is_whole(connection: sqlite3.Connection, blobs: BlobStore, row: DeltaRow) -> bool:
    """Returns whether all parts of the delta exist or are recorded as evicted."""
    return _lost_parts(connection, blobs, row) == []


def repair(connection: sqlite3.Connection, blobs: BlobStore, row: DeltaRow, recipe: int) -> bool:
    """Records lost layers as evicted if ``recipe`` can rebuild them, else deletes the delta.
    Returns whether it is kept.

    Files of a wrong length stay: a rebuild replaces them.
    """
    lost = _lost_parts(connection, blobs, row)
    if lost is not None and all(_can_be_rebuilt(row, part, recipe) for part in lost):
        connection.executemany(
            "UPDATE blobs SET evicted = 1 WHERE digest = ?", [(part.digest.hex,) for part in lost]
        )
        return True
    queries.delete_delta(connection, row.key)
    queries.delete_if_unused(connection, row.content)
    return False


def _lost_parts(
    connection: sqlite3.Connection, blobs: BlobStore, row: DeltaRow
) -> list[Descriptor] | None:
    """Returns parts whose files are missing or have another length; None if the catalogue itself is
    incomplete.
    """
    if row.key.kind == "v2":
        return [] if blobs.size(row.content) == row.delta_bytes else None
    manifest = manifest_of(connection, row.content)
    if manifest is None:
        return None
    statement = (
        "SELECT digest, size, evicted FROM manifest_blobs JOIN blobs ON digest = blob WHERE"
        " manifest = ?"
    )
    expected = {
        hex_: (size, evicted)
        for hex_, size, evicted in connection.execute(statement, (row.content.hex,))
    }
    lost = []
    for part in (manifest.config, *manifest.layers):
        size, evicted = expected.get(part.digest.hex, (None, 0))
        if size != part.size:
            return None
        if not evicted and blobs.size(part.digest) != part.size:
            lost.append(part)
    return lost


def raw_manifest_of(connection: sqlite3.Connection, digest: Digest) -> tuple[str, bytes] | None:
    """Returns media type and bytes of a delta image's manifest, after hashing; None if it is
    missing or wrong.
    """
    found = connection.execute(
        "SELECT media_type, raw FROM manifests WHERE digest = ?", (digest.hex,)
    ).fetchone()
    return found if found is not None and Digest.of(found[1]) == digest else None


def manifest_of(connection: sqlite3.Connection, digest: Digest) -> Manifest | None:
    """Returns the same, parsed."""
    found = raw_manifest_of(connection, digest)
    manifest = None if found is None else parse_manifest(found[1], found[0])
    return manifest if isinstance(manifest, Manifest) else None


def _can_be_rebuilt(row: DeltaRow, part: Descriptor, recipe: int) -> bool:
    """Returns whether a part is a layer with delta contents. Configs, and the empty layer of shared
    layers, need a new build.
    """
    if row.key.recipe != recipe or "effort" not in row.details or "common" not in row.details:
        return False
    return part.size > queries.BLOCK and part.media_type not in queries.CONFIGS
