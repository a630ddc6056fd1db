"""What is known of a base layer before a target is seen: its entries with their content hashes, and its coarse samples.

Kept on disk by diff_id so that a base which many releases share is read once. A file that is damaged, foreign or of
another version is made again; nothing in it is trusted for correctness: the kernel compares bytes before it copies.

The file, little-endian: ``_HEADER`` (magic, version, diff_id, layer size, three counts, xxh3-128 of what follows), then the
arrays of od_member, od_sample and the names, as C has them.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from obdelta.delta import tarmap
from obdelta.delta.kernel import LayerFile, MappedFile, ffi, lib, owned
from obdelta.oci import DiffID

log = logging.getLogger(__name__)

VERSION = 1
"""Goes up whenever the kernel would give another index for the same layer."""
SAMPLE_BITS = 6
"""One window in 2^6 is sampled: 8 bytes of index for 64 bytes of layer."""

_MAGIC = b"obdelta index" + (b"<" if sys.byteorder == "little" else b">")
_HEADER = struct.Struct("<14sH32sQQQQ16s")


class LayerIndex:
    """``tar`` is an ``od_tar``, ``samples``/``sample_count`` its coarse samples. Memory lives as long as this object."""

    def __init__(self, tar: Any, samples: Any, sample_count: int, keep: object) -> None:
        self.tar, self.samples, self.sample_count, self._keep = tar, samples, sample_count, keep

    def members(self, start: int) -> Iterator[tarmap.Member]:
        """The layer's entries; positions are counted from ``start``."""
        return tarmap.members(self.tar, start)


def layer_index(layer: LayerFile, file: MappedFile, folder: Path | None) -> LayerIndex:
    """The index of a mapped layer, from ``folder`` (None: nowhere) or made and left there."""
    path = folder / f"{layer.diff_id.hex}.idx" if folder is not None else None
    if path is not None and path.exists():
        found = _load(path, layer.diff_id, file.size)
        if found is not None:
            return found
        log.warning("match index of layer %s cannot be used; it is made again", layer.diff_id)
    index = _make(file)
    if path is not None:
        try:
            _save(index, path, layer.diff_id, file.size)
        except OSError as error:
            log.warning("match index of layer %s cannot be kept: %s", layer.diff_id, error.strerror)
    return index


def target_index(file: MappedFile) -> Any:
    """Entries with content hashes alone: all that is needed of a target."""
    tar = tarmap.walk(file)
    lib.od_hash_members(file.at, tar.members, tar.count)
    return tar


def _make(file: MappedFile) -> LayerIndex:
    tar = target_index(file)
    samples = owned(lib.od_sample_layer(file.at, file.size, SAMPLE_BITS), lib.od_free_samples)
    file.forget()
    return LayerIndex(tar, samples.samples, samples.count, (tar, samples))


def _save(index: LayerIndex, path: Path, diff_id: DiffID, size: int) -> None:
    tar = index.tar
    parts = [
        ffi.buffer(pointer, count * each)
        for pointer, count, each in (
            (tar.members, tar.count, ffi.sizeof("od_member")),
            (index.samples, index.sample_count, ffi.sizeof("od_sample")),
            (tar.names, tar.names_size, 1),
        )
        if count
    ]
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
    counts = (tar.count, index.sample_count, tar.names_size)
    header = _HEADER.pack(_MAGIC, VERSION, bytes.fromhex(diff_id.hex), size, *counts, checksum.digest())
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(header)
            for part in parts:
                out.write(part)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path, diff_id: DiffID, size: int) -> LayerIndex | None:
    file = MappedFile(path)
    if file.size < _HEADER.size:
        return None
    content = ffi.buffer(file.at, file.size)
    magic, version, known, layer_size, members, samples, names, checksum = _HEADER.unpack(content[: _HEADER.size])
    if (magic, version, known.hex(), layer_size) != (_MAGIC, VERSION, diff_id.hex, size):
        return None
    member_bytes, sample_bytes = members * ffi.sizeof("od_member"), samples * ffi.sizeof("od_sample")
    if _HEADER.size + member_bytes + sample_bytes + names != file.size:
        return None
    body = file.at + _HEADER.size
    if xxhash.xxh3_128(ffi.buffer(body, file.size - _HEADER.size)).digest() != checksum:
        return None
    tar = ffi.new("od_tar *")
    tar.members, tar.count = ffi.cast("od_member *", body), members
    tar.names, tar.names_size = body + member_bytes + sample_bytes, names
    return LayerIndex(tar, ffi.cast("od_sample *", body + member_bytes), samples, file)
