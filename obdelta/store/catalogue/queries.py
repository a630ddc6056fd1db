"""The catalogue's SQL: rows in and out. Everything here runs in the database's thread."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from obdelta.errors import BlobUnknown, SizeMismatch
from obdelta.oci import DiffID, Digest, Form, Manifest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, LayerRow, Totals

BLOCK = 4096
"""Blobs of up to this size are not evicted: this would free nothing."""
CONFIGS = tuple(form.traits.config_type for form in Form)
"""The media types of delta images' configs."""
_SELECT_DELTA = """
    SELECT kind, recipe, base, target, form, base_repository, target_repository, tag, content,
        full_bytes, delta_bytes, seconds, created, last_served, served, details
    FROM deltas """
_INSERT_DELTA = """
    INSERT INTO deltas (
        kind, recipe, base, target, form, base_repository, target_repository, tag, content,
        full_bytes, delta_bytes, seconds, created, last_served, served, details)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_SET_PINNED = """
    UPDATE deltas SET pinned = ?
    WHERE kind = ? AND recipe = ? AND base = ? AND target = ? AND form = ?"""
_UNREFERENCED = """
    SELECT digest, size FROM blobs
    WHERE NOT EXISTS (SELECT 1 FROM manifest_blobs WHERE blob = blobs.digest)
        AND NOT EXISTS (SELECT 1 FROM deltas WHERE kind = 'v2' AND content = blobs.digest)"""


# -- deltas


def deltas(connection: sqlite3.Connection, rest: str, *values: object) -> list[DeltaRow]:
    """Returns rows for the rest of a statement: conditions, order, limit. ``values`` fill its
    question marks.
    """
    return [_delta(row) for row in connection.execute(_SELECT_DELTA + rest, values)]


def delta(connection: sqlite3.Connection, rest: str, *values: object) -> DeltaRow | None:
    """Returns the first row that ``rest`` of the statement selects, None without one."""
    found = deltas(connection, rest, *values)
    return found[0] if found else None


def find(connection: sqlite3.Connection, key: DeltaKey) -> DeltaRow | None:
    """Returns the row of a key."""
    rest = "WHERE kind = ? AND recipe = ? AND base = ? AND target = ? AND form = ?"
    return delta(connection, rest, *key_values(key))


def key_values(key: DeltaKey) -> tuple[str, int, str, str, str]:
    """Returns a key's columns: kind, recipe, base, target, form."""
    return key.kind, key.recipe, key.base.hex, key.target.hex, key.form.value


def _delta(row: tuple[Any, ...]) -> DeltaRow:
    kind, recipe, base, target, form, base_repository, target_repository, tag, content = row[:9]
    full_bytes, delta_bytes, seconds, created, last_served, served, details = row[9:]
    return DeltaRow(
        DeltaKey(kind, recipe, Digest(base), Digest(target), Form(form)),
        base_repository,
        target_repository,
        tag,
        Digest(content),
        full_bytes,
        delta_bytes,
        seconds,
        created,
        last_served,
        served,
        json.loads(details),
    )


def insert_delta(connection: sqlite3.Connection, row: DeltaRow) -> DeltaRow:
    """Inserts a row; returns it as written."""
    connection.execute(
        _INSERT_DELTA,
        (
            *key_values(row.key),
            row.base_repository,
            row.target_repository,
            row.tag,
            row.content.hex,
            row.full_bytes,
            row.delta_bytes,
            row.seconds,
            row.created,
            row.last_served,
            row.served,
            json.dumps(dict(row.details), sort_keys=True),
        ),
    )
    found = find(connection, row.key)
    if found is None:
        raise AssertionError("a row that was just written is there")
    return found


def insert_publication(
    connection: sqlite3.Connection, key: DeltaKey, base: str, target: str
) -> None:
    """Makes a delta visible for a pair of repositories, in all forms that there are."""
    connection.execute(
        "INSERT INTO publications SELECT id, ?, ? FROM deltas"
        " WHERE kind = ? AND recipe = ? AND base = ? AND target = ? ON CONFLICT DO NOTHING",
        (target, base, key.kind, key.recipe, key.base.hex, key.target.hex),
    )


def is_pinned(connection: sqlite3.Connection, key: DeltaKey) -> bool:
    """Returns whether an operator has pinned a delta."""
    found = connection.execute(
        "SELECT pinned FROM deltas"
        " WHERE kind = ? AND recipe = ? AND base = ? AND target = ? AND form = ?",
        key_values(key),
    )
    return bool(found.fetchone() == (1,))


def pin(
    connection: sqlite3.Connection, key: DeltaKey, pinned: bool, most: int | None = None
) -> bool:
    """Pins a delta, or ends that. Returns False, and changes nothing, if the pinned deltas would
    take more than ``most`` bytes.
    """
    connection.execute(_SET_PINNED, (pinned, *key_values(key)))
    if pinned and most is not None and pinned_bytes(connection) > most:
        connection.execute(_SET_PINNED, (False, *key_values(key)))
        return False
    return True


def pinned_bytes(connection: sqlite3.Connection) -> int:
    """Returns the bytes of all pinned deltas. Blobs that several share count for each."""
    (size,) = connection.execute(
        "SELECT coalesce(sum(delta_bytes), 0) FROM deltas WHERE pinned = 1"
    ).fetchone()
    return int(size)


def delete_delta(connection: sqlite3.Connection, key: DeltaKey) -> None:
    connection.execute(
        "DELETE FROM deltas WHERE kind = ? AND recipe = ? AND base = ? AND target = ? AND form = ?",
        key_values(key),
    )


def deltas_with_blob(connection: sqlite3.Connection, digest: Digest) -> list[DeltaRow]:
    """Returns the deltas that cannot be served without a blob."""
    rest = "WHERE content = ? OR content IN (SELECT manifest FROM manifest_blobs WHERE blob = ?)"
    return deltas(connection, rest, digest.hex, digest.hex)


# -- manifests and blobs


def insert_manifest(connection: sqlite3.Connection, manifest: Manifest) -> None:
    """Inserts a manifest with its blobs, any of which may exist already."""
    connection.execute(
        "INSERT INTO manifests VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (manifest.digest.hex, manifest.media_type, manifest.raw),
    )
    for part in (manifest.config, *manifest.layers):
        insert_blob(connection, part.digest, part.size)
        connection.execute(
            "INSERT INTO manifest_blobs VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (manifest.digest.hex, part.digest.hex, part.media_type),
        )


def insert_blob(connection: sqlite3.Connection, digest: Digest, size: int) -> None:
    """Records a file that deltas need and that is stored."""
    connection.execute(
        "INSERT INTO blobs (digest, size) VALUES (?, ?) ON CONFLICT (digest) DO UPDATE SET"
        " evicted = 0",
        (digest.hex, size),
    )


def delete_unused_manifests(connection: sqlite3.Connection) -> None:
    """Deletes manifests without any delta."""
    connection.execute(
        "DELETE FROM manifests WHERE digest NOT IN (SELECT content FROM deltas WHERE kind = 'v3')"
    )


def delete_if_unused(connection: sqlite3.Connection, manifest: Digest) -> None:
    """Deletes one manifest if it has no delta, without reading all of them."""
    connection.execute(
        "DELETE FROM manifests WHERE digest = ?"
        " AND NOT EXISTS (SELECT 1 FROM deltas WHERE kind = 'v3' AND content = digest)",
        (manifest.hex,),
    )


def blobs_of(connection: sqlite3.Connection, row: DeltaRow) -> list[Digest]:
    """Returns the blobs that a delta needs in the blob store."""
    if row.key.kind == "v2":
        return [row.content]
    found = connection.execute(
        "SELECT blob FROM manifest_blobs WHERE manifest = ?", (row.content.hex,)
    )
    return [Digest(hex_) for (hex_,) in found]


def discard_unreferenced(
    connection: sqlite3.Connection, blobs: BlobStore, only: Digest | None = None
) -> int:
    """Removes the files that nothing refers to (all, or only one), except pinned ones. Returns the
    bytes freed.
    """
    if only is None:
        found = connection.execute(_UNREFERENCED).fetchall()
    else:
        found = connection.execute(_UNREFERENCED + " AND digest = ?", (only.hex,)).fetchall()
    freed = 0
    for hex_, size in found:
        there = blobs.size(Digest(hex_)) is not None
        if blobs.discard(Digest(hex_)):
            connection.execute("DELETE FROM blobs WHERE digest = ?", (hex_,))
            freed += size if there else 0
    return freed


def has_evicted(connection: sqlite3.Connection, manifest: Digest) -> bool:
    """Returns whether blobs of a manifest were evicted."""
    found = connection.execute(
        "SELECT 1 FROM manifest_blobs JOIN blobs ON blobs.digest = blob WHERE manifest = ? AND"
        " evicted = 1 LIMIT 1",
        (manifest.hex,),
    )
    return found.fetchone() is not None


def require_blob(blobs: BlobStore, digest: Digest, size: int) -> None:
    """Raises BlobUnknown or SizeMismatch unless the file exists."""
    actual = blobs.size(digest)
    if actual is None:
        raise BlobUnknown(digest)
    if actual != size:
        raise SizeMismatch(size, actual, f"blob {digest}")


# -- inflated layers and totals


def insert_layer(connection: sqlite3.Connection, row: LayerRow) -> None:
    """Records what a blob inflates to, if that is not recorded yet."""
    connection.execute(
        "INSERT INTO layers VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (row.blob.hex, row.blob_size, row.diff_id.hex, row.size, row.media_type),
    )


def layer(connection: sqlite3.Connection, blob: Digest) -> LayerRow | None:
    """Returns what a blob inflates to."""
    row = connection.execute("SELECT * FROM layers WHERE blob = ?", (blob.hex,)).fetchone()
    if row is None:
        return None
    return LayerRow(Digest(row[0]), row[1], DiffID(row[2]), row[3], row[4])


def totals(connection: sqlite3.Connection) -> Totals:
    """Returns the totals of the catalogue."""
    (deltas_,) = connection.execute("SELECT count(*) FROM deltas").fetchone()
    stored = "SELECT count(*), coalesce(sum(size), 0) FROM blobs WHERE evicted = 0"
    blobs, size = connection.execute(stored).fetchone()
    return Totals(deltas_, blobs, size)
