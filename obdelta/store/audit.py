"""What a ``state-dir`` should hold, and whether it does: read only, beside a running server too."""

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
    """What the catalogue says. ``blobs``: sizes of the files that should be here; ``evicted``:
    those that were given up, and are made again when somebody asks; ``manifests`` and ``parts`` by
    a delta's content: media type and bytes, and its blobs.
    """

    deltas: tuple[DeltaRow, ...]
    manifests: dict[Digest, tuple[str, bytes]]
    parts: dict[Digest, frozenset[Digest]]
    blobs: dict[Digest, int]
    evicted: frozenset[Digest]


def read_inventory(state_dir: Path) -> Inventory:
    """Raises what :func:`~obdelta.store.catalogue.database.reading` raises."""
    with reading(state_dir / "catalogue.sqlite") as connection:
        connection.execute("BEGIN")  # one moment of it
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


def place_of(state_dir: Path, digest: Digest) -> Path:
    """Where a blob lies, whether it is there or not."""
    return state_dir / "blobs" / "sha256" / digest.hex[:2] / digest.hex


def problem_of(
    path: Path, digest: Digest, size: int, read: Callable[[int], None] = lambda _: None
) -> str | None:
    """Hashes a file; what is wrong with it, or None. ``read`` is told of each piece, in bytes, and
    may end it by raising.
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
