"""The index of a base layer, kept on disk: its entries with content hashes, and its blocks' hashes.

It is made before a target is known, and stored by diff_id, so that a base of many releases is read
once. A file that is damaged, foreign or of another version is rebuilt. Nothing in it is trusted for
correctness: the kernel compares bytes before it copies.

The file is little-endian. It begins with ``_HEADER``: magic, version, diff_id, layer size, two
counts, xxh3-128 of the rest. Then follow, as C has them, the array of od_member, the blocks' hashes
(32 bits for each whole block of the layer) and the names.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from obdelta.delta import tar_index
from obdelta.delta.kernel.binding import LayerFile, MappedFile, ffi, lib, waited_for
from obdelta.oci import DiffID

log = logging.getLogger(__name__)

MB = 1024 * 1024

VERSION = 3
"""Increased whenever the kernel would give another index for the same layer."""

_MAGIC = b"obdelta index" + (b"<" if sys.byteorder == "little" else b">")
_HEADER = struct.Struct("<14sH32sQQQ16s")


RANGE = 32 * MB
"""Bytes of a layer that are read at once."""
SMALL = MB
"""Layers of at most this size are hashed at once: another thread costs more than it saves."""


class LayerIndex:
    """A layer's index. ``tar`` is an ``od_tar``, ``blocks`` an array of the blocks' hashes; both
    point into ``keep``.
    """

    def __init__(self, tar: Any, blocks: Any, block_count: int, keep: object = None) -> None:
        self.tar, self.blocks, self.block_count, self._keep = tar, blocks, block_count, keep

    @property
    def kept(self) -> bool:
        """Whether it was read from disk."""
        return self._keep is not None


def layer_indexes(
    layers: Sequence[LayerFile],
    files: Sequence[MappedFile],
    folder: Path | None,
    pool: ThreadPoolExecutor,
) -> Iterator[LayerIndex]:
    """Yields the indexes of mapped layers in order. They are read from ``folder`` (None: nowhere),
    or made in the pool's threads and stored there.
    """
    found = [_load(layer, file, folder) for layer, file in zip(layers, files, strict=True)]
    making = [
        None if index is not None else _Making(file, pool)
        for index, file in zip(found, files, strict=True)
    ]
    saved: list[Future[None]] = []
    for layer, file, loaded, made in zip(layers, files, found, making, strict=True):
        if loaded is not None:
            yield loaded
        elif made is not None:
            index = made.result()
            if folder is not None:
                saved.append(
                    pool.submit(_save, index, folder / _name(layer), layer.diff_id, file.size)
                )
            yield index
    for future in saved:
        future.result()


def target_index(file: MappedFile, pool: ThreadPoolExecutor) -> Any:
    """Returns a target's entries with content hashes (an ``od_tar``). No blocks are hashed."""
    tar = tar_index.walk(file)
    futures = _hashed(file, tar, pool)
    with waited_for(futures):
        for future in futures:
            future.result()
    return tar


def _hashed(file: MappedFile, tar: Any, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Fills in the members' hashes, in batches of about RANGE bytes."""
    futures: list[Future[None]] = []
    first, start = 0, 0
    for number, end in enumerate(tar_index.ends(tar), 1):
        if end - start >= RANGE or number == tar.count:
            futures.append(_started(pool, file, _hash, tar, first, number - first, start, end))
            first, start = number, end
    return futures


def _started(
    pool: ThreadPoolExecutor, file: MappedFile, function: Callable[..., None], *arguments: Any
) -> Future[None]:
    """Runs a function on a part of a file in the pool, or here if the file is small."""
    if file.size > SMALL:
        return pool.submit(function, file, *arguments)
    function(file, *arguments)
    done = Future[None]()
    done.set_result(None)
    return done


def _hash(file: MappedFile, tar: Any, first: int, count: int, start: int, end: int) -> None:
    lib.od_hash_members(file.at, tar.members + first, count)
    file.forget(start, end)


class _Making:
    """An index that is being made."""

    def __init__(self, file: MappedFile, pool: ThreadPoolExecutor) -> None:
        self._tar = tar_index.walk(file)
        self._count = file.size // lib.OD_BLOCK
        self._blocks = ffi.new("uint32_t[]", max(1, self._count))
        self._hashed = _hashed(file, self._tar, pool)
        each = RANGE // lib.OD_BLOCK
        for first in range(0, self._count, each):
            count = min(each, self._count - first)
            self._hashed.append(_started(pool, file, _hash_blocks, first, count, self._blocks))

    def result(self) -> LayerIndex:
        for future in self._hashed:
            future.result()
        return LayerIndex(self._tar, self._blocks, self._count)


def _hash_blocks(file: MappedFile, first: int, count: int, hashes: Any) -> None:
    lib.od_block_hashes(file.at, first, count, hashes + first)
    file.forget(first * lib.OD_BLOCK, (first + count) * lib.OD_BLOCK)


def _name(layer: LayerFile) -> str:
    return f"{layer.diff_id.hex}.idx"


def _load(layer: LayerFile, file: MappedFile, folder: Path | None) -> LayerIndex | None:
    if folder is None or not (path := folder / _name(layer)).exists():
        return None
    found = _read(path, layer.diff_id, file.size)
    if found is None:
        log.warning("the match index of layer %s cannot be used: it is rebuilt", layer.diff_id)
    return found


def _save(index: LayerIndex, path: Path, diff_id: DiffID, size: int) -> None:
    tar = index.tar
    arrays = [
        (tar.members, tar.count, ffi.sizeof("od_member")),
        (index.blocks, index.block_count, ffi.sizeof("uint32_t")),
        (tar.names, tar.names_size, 1),
    ]
    parts = [ffi.buffer(pointer, count * each) for pointer, count, each in arrays if count]
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
    counts = (tar.count, tar.names_size)
    header = _HEADER.pack(
        _MAGIC, VERSION, bytes.fromhex(diff_id.hex), size, *counts, checksum.digest()
    )
    try:
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
    except OSError as error:
        log.warning("the match index of layer %s was not stored: %s", diff_id, error.strerror)


def _read(path: Path, diff_id: DiffID, size: int) -> LayerIndex | None:
    file = MappedFile(path)
    if file.size < _HEADER.size:
        return None
    content = ffi.buffer(file.at, file.size)
    magic, version, known, layer_size, members, names, checksum = _HEADER.unpack(
        content[: _HEADER.size]
    )
    if (magic, version, known.hex(), layer_size) != (_MAGIC, VERSION, diff_id.hex, size):
        return None
    member_bytes = members * ffi.sizeof("od_member")
    blocks = size // lib.OD_BLOCK
    block_bytes = blocks * ffi.sizeof("uint32_t")
    if _HEADER.size + member_bytes + block_bytes + names != file.size:
        return None
    body = file.at + _HEADER.size
    if xxhash.xxh3_128(ffi.buffer(body, file.size - _HEADER.size)).digest() != checksum:
        return None
    tar = ffi.new("od_tar *")
    tar.members, tar.count = ffi.cast("od_member *", body), members
    tar.names, tar.names_size = body + member_bytes + block_bytes, names
    if not lib.od_tar_fits(tar, size):
        return None
    return LayerIndex(tar, ffi.cast("uint32_t *", body + member_bytes), blocks, file)
