"""Applies delta streams to a base, and proves that a finished delta layer leads to its target.

Sources: ``docs/delta-format.md``; the kernel applies the stream (``stream.c``).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import BinaryIO, Protocol

from obdelta.delta.inflate import CountedReader, inflated
from obdelta.delta.kernel.binding import Base, LayerFile, ffi, lib
from obdelta.errors import LayerInvalid, ProofFailed, StreamInvalid
from obdelta.oci import DiffID

CHUNK = 1024 * 1024
"""Bytes that are read and written at once."""
SMALL = 64 * 1024
"""Fewer bytes are hashed here, because another thread costs more than it saves."""


_unset = ffi.new_allocator(should_clear_after_alloc=False)


class Readable(Protocol):
    """The methods of a binary file that are needed here."""

    def read(self, most: int, /) -> bytes:
        """Returns up to ``most`` bytes; empty at the end."""


_REASONS = {
    lib.OD_BAD_MAGIC: "it does not begin with the magic of a librsync delta",
    lib.OD_BAD_COMMAND: "unknown command",
    lib.OD_BAD_RANGE: "a copy leaves the base",
    lib.OD_BAD_NUMBER: "a negative number or an empty copy",
}


def patch(base: Sequence[LayerFile] | Path, delta: Readable, out: BinaryIO | None) -> DiffID:
    """Applies an untrusted delta stream to the base and writes the target to ``out`` (None:
    nowhere). Returns the target's sha256.

    Works as a stream: memory does not grow with either side. Raises StreamInvalid for anything but
    one whole stream; the bytes written to ``out`` until then are worthless.
    """
    paths = [base] if isinstance(base, Path) else [layer.path for layer in base]
    with Base(paths) as mapped:
        return apply(mapped, delta, out)


def apply(base: Base, delta: Readable, out: BinaryIO | None) -> DiffID:
    """Does the same as :func:`patch` for a base that is already mapped."""
    reader = ffi.new("od_reader *")
    used, made = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    sha256 = hashlib.sha256()
    status = lib.OD_MORE
    written = 0
    # Hashing takes as long as everything else here: it has its own thread, and one buffer while the
    # other is filled.
    with ThreadPoolExecutor(1, "hash") as hashing:
        buffers = _Buffer(), _Buffer()
        turns, last = cycle(buffers), buffers[1]
        while status != lib.OD_DONE:
            chunk = delta.read(CHUNK)
            if not chunk:
                raise StreamInvalid(reader.offset, "it is truncated")
            at, pointer = 0, ffi.from_buffer("uint8_t[]", chunk)
            while True:
                buffer = next(turns)
                buffer.hashed.result()
                status = lib.od_apply(
                    reader, base.c, pointer + at, len(chunk) - at, used, buffer.room, CHUNK, made
                )
                if status < 0:
                    raise StreamInvalid(reader.offset, _REASONS[status])
                at += used[0]
                part = buffer.view[: made[0]]
                if made[0] < SMALL:
                    last.hashed.result()
                    sha256.update(part)
                else:
                    buffer.hashed = hashing.submit(sha256.update, part)
                last = buffer
                if out is not None:
                    out.write(part)
                written += made[0]
                if written >= 64 * CHUNK:
                    base.forget()
                    written = 0
                if status != lib.OD_FULL:
                    break
    if at != len(chunk) or delta.read(1):
        raise StreamInvalid(reader.offset, "bytes follow its end")
    return DiffID(sha256.hexdigest())


class _Buffer:
    """CHUNK bytes, and the event after which they may be overwritten. Memory is used only as they
    are filled.
    """

    def __init__(self) -> None:
        self.room = _unset("uint8_t[]", CHUNK)
        self.view = memoryview(ffi.buffer(self.room))
        self.hashed: Future[None] = Future()
        self.hashed.set_result(None)


def prove_layer(base: Sequence[LayerFile] | Base, blob: Path, expected: DiffID) -> None:
    """Applies the finished blob and compares the result with the target's diff_id. Raises
    ProofFailed.
    """
    if not isinstance(base, Base):
        with Base([layer.path for layer in base]) as mapped:
            prove_layer(mapped, blob, expected)
        return
    with blob.open("rb") as file:
        prove(base, file, expected)


def prove(base: Base, blob: Readable, expected: DiffID) -> None:
    """Does the same as :func:`prove_layer` for a blob that is read as it arrives, to its end."""
    try:
        found = apply(base, _Entry(inflated(CountedReader(blob))), None)
    except (StreamInvalid, LayerInvalid, tarfile.TarError) as error:
        raise ProofFailed(expected, f"{error}") from error
    if found != expected:
        raise ProofFailed(expected, f"it leads to {found}")


class _Entry:
    """The only entry of a delta layer's tar, as a file. Only the end of the tar may follow it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk = chunks, b""
        header = tarfile.TarInfo.frombuf(self._exactly(512), "utf-8", "strict")
        if header.name != "delta" or header.type != tarfile.REGTYPE:
            raise tarfile.HeaderError("its first entry is not a file named delta")
        self._left, self._padding, self._ended = header.size, -header.size % 512, False

    def read(self, most: int, /) -> bytes:
        """Returns up to ``most`` bytes of the entry; empty at its end."""
        chunk = self._some(min(most, self._left))
        self._left -= len(chunk)
        if not self._left and not self._ended:
            self._ended = True
            if self._exactly(self._padding + 1025) != bytes(self._padding + 1024):
                raise tarfile.HeaderError("its tar does not end after the delta")
        return chunk

    def _some(self, most: int) -> bytes:
        if not self._chunk:
            self._chunk = next(self._chunks, b"")
        some, self._chunk = self._chunk[:most], self._chunk[most:]
        return some

    def _exactly(self, size: int) -> bytes:
        """Returns that many bytes, or fewer at the end."""
        found = b""
        while len(found) < size and (some := self._some(size - len(found))):
            found += some
        return found
