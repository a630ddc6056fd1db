"""Chooses which bytes of the base are sampled for a target layer, and builds the sampled index.

Sampling costs time for each byte, and most of a base is useless to a search. It is in the target
unchanged, or in layers that are unrelated to the target. Two kinds of bytes are sampled: old
versions of the changed entries, and bytes that the target left out of the layers that it replaces.
All of the base is sampled only for a target with many entries without a similar name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from obdelta.delta.kernel.binding import Base, MappedFile, ffi, lib, owned

MB = 1024 * 1024
SAMPLE_BITS = 6
"""One window in 2^6 is sampled: 8 bytes of samples for 64 bytes of layer."""
MAX_SAMPLES = 8 * MB
"""Maximum number of samples that are kept in memory, at 13 bytes each."""
PIECE = 16 * MB
"""Bytes that are sampled in one call."""


class Stretch(NamedTuple):
    """Bytes ``[start, end)`` of a layer of the base; layers are counted from the bottom."""

    layer: int
    start: int
    end: int


def whole(base: Base) -> list[Stretch]:
    """Returns all of the base."""
    return [Stretch(number, 0, file.size) for number, file in enumerate(base.files) if file.size]


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Returns the stretches in order, joined if they touch."""
    found: list[Stretch] = []
    for stretch in sorted(stretches):
        if found and found[-1].layer == stretch.layer and stretch.start <= found[-1].end:
            if stretch.end > found[-1].end:
                found[-1] = found[-1]._replace(end=stretch.end)
        else:
            found.append(stretch)
    return found


def sampled_index(base: Base, stretches: list[Stretch], pool: ThreadPoolExecutor) -> Any:
    """Returns the ``od_sampled`` of joined stretches, sampled in the pool's threads; NULL
    without samples.
    """
    if not stretches:
        return ffi.NULL
    expected = sum(stretch.end - stretch.start for stretch in stretches) >> SAMPLE_BITS
    thin = ((expected - 1) // MAX_SAMPLES).bit_length() if expected else 0
    sampled = owned(lib.od_sampled_new(expected, SAMPLE_BITS, thin), lib.od_free_sampled)
    # Always added in order: a full bucket takes no more, whichever thread ends first.
    for layer, samples in pool.map(
        lambda batch: _sampled(base.files, batch), list(_batches(stretches))
    ):
        for part in samples:
            lib.od_sampled_add(sampled, part.samples, part.count, base.starts[layer])
    return sampled


def _batches(stretches: list[Stretch]) -> Iterator[list[Stretch]]:
    """Yields batches of one layer each, and of about PIECE bytes. Long stretches are always cut at
    the same positions.
    """
    batch: list[Stretch] = []
    size = 0
    for stretch in stretches:
        if batch and batch[0].layer != stretch.layer:
            yield batch
            batch, size = [], 0
        for start in range(stretch.start, stretch.end, PIECE):
            piece = Stretch(stretch.layer, start, min(stretch.end, start + PIECE))
            batch.append(piece)
            size += piece.end - piece.start
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _sampled(files: list[MappedFile], batch: list[Stretch]) -> tuple[int, list[Any]]:
    layer = batch[0].layer
    file = files[layer]
    found = []
    for stretch in batch:
        samples = lib.od_sample_range(file.at, file.size, stretch.start, stretch.end, SAMPLE_BITS)
        found.append(owned(samples, lib.od_free_samples))
    file.forget(batch[0].start, batch[-1].end)
    return layer, found
