"""Reads from a ``state-dir`` which files it should hold, and hashes them. Read only; works beside a
running server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from obdelta.oci import Digest
from obdelta.store.catalogue import queries
from obdelta.store.catalogue.database import reading
from obdelta.store.catalogue.records import DeltaRow

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Inventory:
    """The contents that the catalogue records.

    ``blobs``: sizes of the files that should exist. ``evicted``: blobs that were evicted and are
    rebuilt on request. ``manifests`` (media type and bytes) and ``parts`` (blobs) are keyed by a
    delta's content.
    """

    deltas: tuple[DeltaRow, ...]
    manifests: dict[Digest, tuple[str, bytes]]
    parts: dict[Digest, frozenset[Digest]]
    blobs: dict[Digest, int]
    evicted: frozenset[Digest]


def read_inventory(state_dir: Path) -> Inventory:
    """Returns the inventory of one moment. Raises what
    :func:`~obdelta.store.catalogue.database.reading` raises.
    """
    with reading(state_dir / "catalogue.sqlite") as connection:
        connection.execute("BEGIN")  # one consistent snapshot
        deltas = tuple(queries.deltas(connection, "ORDER BY id"))
        manifests = connection.execute("SELECT digest, media_type, raw FROM manifests").fetchall()
        blobs = connection.execute("SELECT digest, size, evicted FROM blobs").fetchall()
        parts = {row.content: frozenset(queries.blobs_of(connection, row)) for row in deltas}
    return Inventory(
        deltas,
        {Digest(hex_): (media_type, raw) for hex_, media_type, raw in manifests},
        parts,
        {Digest(hex_): size for hex_, size, evicted in blobs if not evicted},
        frozenset(Digest(hex_) for hex_, _, evicted in blobs if evicted),
    )


def blob_path(state_dir: Path, digest: Digest) -> Path:
    """Returns the path of a blob, whether the file exists or not."""
    return state_dir / "blobs" / "sha256" / digest.hex[:2] / digest.hex


def find_problem(
    path: Path, digest: Digest, size: int, read: Callable[[int], None] = lambda _: None
) -> str | None:
    """Hashes a file and returns the problem found, or None.

    ``read`` is called with the size of each piece in bytes; it stops the work by raising.
    """
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"it has {actual} bytes, not {size}"
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                sha256.update(piece)
                read(len(piece))
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    found = Digest(sha256.hexdigest())
    return None if found == digest else f"it hashes to {found}"
