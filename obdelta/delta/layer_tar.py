"""The tar of a delta layer: one entry that holds the command stream, made in pieces.

The layers that copy a whole base layer are made here at once, for the leading layers that base and
target share. An engine that has the base as an image skips these layers. An engine that has the
base in another store (``--delta-data-root``, host-OS updates) applies them, and fails on an empty
layer instead.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import deflate

from obdelta.delta.compress import member_size
from obdelta.delta.image import FinishedLayer
from obdelta.delta.kernel.binding import NONE, MappedFile, ffi, lib, owned
from obdelta.oci import DiffID, Digest

_LEVEL = 12
"""libdeflate's level; the tar is below 2 KB, so that the time does not matter."""


_MAGIC, _END = b"\x72\x73\x02\x36", b"\x00"


def stream_size(plan: Any) -> int:
    """Returns the bytes of the librsync stream of an ``od_plan``."""
    return int(len(_MAGIC) + lib.od_encoded_size(plan.commands, plan.count) + len(_END))


def tar_size(stream: int) -> int:
    """Returns the size of the tar of a stream of this size."""
    return len(_header(stream)) + stream + _padding(stream)


def pieces(
    plan: Any, file: MappedFile | None, stream: int, passed: Callable[[int], None]
) -> Iterator[bytearray]:
    """Yields the tar of a plan in pieces that become one gzip member each.

    ``file`` is the target, None for a plan that only copies; ``stream`` is the stream's size.
    ``passed`` is called with the number of target bytes that are encoded so far.
    """
    member = member_size(stream)
    at, next_command = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    target, target_size = (file.at, file.size) if file is not None else (ffi.NULL, NONE)
    piece = bytearray(_header(stream) + _MAGIC)
    # An image may have 120 layers of a few bytes, so there is only as much room as is needed.
    buffer = bytearray(min(member, stream))
    room = ffi.from_buffer("uint8_t[]", buffer)
    while next_command[0] < plan.count:
        # A command is at most a literal of 1 MB, so each round makes progress; a piece may be
        # larger by that much.
        made = lib.od_encode(
            plan.commands, plan.count, next_command, target, target_size, at, room, len(buffer)
        )
        piece += memoryview(buffer)[:made]
        if len(piece) >= member:
            yield piece
            piece = bytearray()
        passed(at[0])
    piece += _END + bytes(_padding(stream))
    yield piece


def copy_plan(start: int, size: int) -> Any:
    """Returns the ``od_plan`` that copies ``size`` bytes of the base from ``start`` on."""
    command = ffi.new("od_command[]", [{"size": size, "source": start}] if size else [])
    return owned(lib.od_plan_of(command, len(command)), lib.od_free_plan)


def _padding(size: int) -> int:
    """Returns the zeros behind a tar's only entry: to the end of its block, and two blocks more."""
    return -size % 512 + 1024


def _header(size: int) -> bytes:
    entry = tarfile.TarInfo("delta")
    entry.size, entry.mode, entry.mtime = size, 0o600, 0
    return entry.tobuf(tarfile.GNU_FORMAT)


class LayerCopy(NamedTuple):
    """A delta layer with its gzip'd bytes."""

    content: bytes
    layer: FinishedLayer


def layer_copies(base: Iterable[tuple[DiffID, int]]) -> list[LayerCopy]:
    """Returns a copy of each of the first layers of a base, given as diff_ids and sizes of their
    tars, bottom to top.

    A layer that occurs twice is copied from its first position: the same layer has the same bytes.
    Nothing is read. A diff_id and its size were taken from the same tar when the layer was
    inflated, so the copied range hashes to the diff_id.
    """
    places: dict[DiffID, int] = {}
    start, copies = 0, []
    for diff_id, size in base:
        copies.append(_copied(places.setdefault(diff_id, start), size, diff_id))
        start += size
    return copies


def _copied(start: int, size: int, target: DiffID) -> LayerCopy:
    plan = copy_plan(start, size)
    tar = b"".join(pieces(plan, None, stream_size(plan), lambda _: None))
    content = bytes(deflate.gzip_compress(tar, _LEVEL))
    return LayerCopy(
        content, FinishedLayer(Digest.of(content), len(content), DiffID.of(tar), target)
    )
