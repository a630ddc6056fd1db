"""Imports delta layers of another program: packs them like our own and proves them before use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from obdelta.delta.apply import prove_layer
from obdelta.delta.compress import GzipWriter, member_size
from obdelta.delta.kernel.binding import Base, LayerFile
from obdelta.errors import DigestMismatch
from obdelta.oci import DiffID, Digest

LEVEL = 9
"""libdeflate's level, the same as effort ``balanced``."""


class AdoptedLayer(NamedTuple):
    """An imported layer: ``digest`` and ``size`` of the gzip'd blob, ``diff_id`` and ``tar_size``
    of the tar inside, and the ``target`` layer.
    """

    digest: Digest
    size: int
    diff_id: DiffID
    tar_size: int
    target: DiffID


def adopt_layers(
    base: Sequence[LayerFile],
    layers: Sequence[tuple[Path, DiffID, DiffID]],
    outs: Sequence[Path],
    *,
    threads: int,
    progress: Callable[[int, str], None] = lambda _number, _stage: None,
) -> list[AdoptedLayer]:
    """Packs each layer (the tar of a delta stream, its diff_id, the target's diff_id) as a gzip'd
    blob at its place in ``outs``.

    The same tar gives the same bytes. Raises DigestMismatch for a tar with another diff_id, and
    ProofFailed.
    """
    made = []
    with Base([layer.path for layer in base]) as mapped, ThreadPoolExecutor(threads) as pool:
        for number, ((tar, diff_id, target), out) in enumerate(zip(layers, outs, strict=True)):
            progress(number, "deflate")
            layer = _packed(tar, diff_id, target, out, pool, threads)
            progress(number, "prove")
            prove_layer(mapped, out, target)
            made.append(layer)
    return made


def _packed(
    tar: Path, diff_id: DiffID, target: DiffID, out: Path, pool: ThreadPoolExecutor, threads: int
) -> AdoptedLayer:
    inside, blob = hashlib.sha256(), hashlib.sha256()
    size = tar.stat().st_size
    member = member_size(size)
    with tar.open("rb") as source, out.open("wb") as sink:
        writer = GzipWriter(sink, blob, pool, LEVEL, threads + 1)
        left = size
        while left:
            # The last piece includes a small rest: members of a few bytes cost engines more than
            # they hold.
            piece = source.read(left if left < 2 * member else member)
            if not piece:
                break
            left -= len(piece)
            inside.update(piece)
            writer.put(piece)
        writer.finish()
    if inside.hexdigest() != diff_id.hex:
        raise DigestMismatch(diff_id, f"sha256:{inside.hexdigest()}", "delta layer of the engine")
    return AdoptedLayer(Digest(blob.hexdigest()), writer.size, diff_id, size, target)
