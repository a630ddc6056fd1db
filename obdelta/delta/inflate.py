"""Inflates compressed layers (gzip, zstd, bzip2, plain) to uncompressed tars and hashes them on the
way.

The code that fetched a blob has already compared its digest.

Sources: RFC 1952 (gzip), RFC 8878 (zstd, skippable frames), OCI image specification ``layer.md``.
The compressions are those that moby's ``pkg/archive`` reads without another program; an empty blob
is an empty layer.
"""

from __future__ import annotations

import bz2
import hashlib
import queue
import re
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import zstandard
from isal import isal_zlib

from obdelta.delta.tar_index import check_tar
from obdelta.errors import LayerInvalid
from obdelta.oci import DiffID

READ = 256 * 1024
"""Bytes of the blob that are read at once."""
MEMBER_READ = 512
"""Bytes that a gzip member gets at first; each time it needs more, it gets twice as many."""
CHUNK = 1024 * 1024
"""Maximum number of bytes that are inflated before they are passed on."""
ZSTD_READ = 2048
"""Bytes that zstd gets at a time. Few, because a run-length block of 4 bytes inflates to 128 KB,
and the decoder returns everything at once.
"""
ZSTD_WINDOW = 128 * 1024 * 1024
"""The largest accepted window (``zstd --long=27``), in bytes of memory."""
GATHERED = 64 * 1024
"""Bytes that are gathered before they are passed on, because each chunk costs the writer a turn."""
MEMBERS, MEMBER_BYTES, STREAM_BYTES = 1_000, 256, 16 * 1024
"""Limits of gzip members, zstd frames and bzip2 streams. Any blob may have MEMBERS of them, and one
more for each MEMBER_BYTES inflated (bzip2: STREAM_BYTES).

Each takes a fixed time, however small it is. A tar consists of blocks of 512 bytes, so no writer
comes near this, not even one that compresses each entry on its own (eStargz, zstd:chunked). The
smallest streams of parallel bzip2 have 100,000 bytes.
"""

_MAGIC = 6
"""Bytes that identify a compression."""

FIRST_WAIT, MAX_WAIT = 0.001, 0.02
"""Seconds between two checks of a file that is still being written."""

_GZIP_ERROR = cast("type[Exception]", isal_zlib.error)  # its stubs take it for an instance
_GZIP, _ZSTD, _BZIP2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""The first bytes of zstd's skippable frames; pzstd and zstd:chunked write them before other
frames.
"""
_REFUSED = {b"\xfd7zXZ": "xz"}


class ImportedLayer(NamedTuple):
    """The result of an import: the blob's size, and the diff_id and size of the tar inside; in
    bytes.
    """

    blob_size: int
    diff_id: DiffID
    size: int


def import_layer(
    source: BinaryIO | Path,
    out: Path,
    *,
    limit: int,
    progress: Callable[[int], None] | None = None,
    final_size: int | None = None,
) -> ImportedLayer:
    """Inflates ``source`` (gzip with any number of members, zstd, bzip2, or plain; the first bytes
    decide) to ``out``.

    ``final_size`` is the final size of a file at ``source`` that is still being written; this waits
    for all of it, without a time limit. ``progress`` is called with the bytes written so far.
    Raises LayerInvalid for more than ``limit`` bytes, a damaged or truncated blob, bytes behind its
    end, and content that is no tar; ``out`` is removed then.
    """
    try:
        if isinstance(source, Path):
            with source.open("rb", buffering=0) as file:
                whole = file if final_size is None else _GrowingSource(file, final_size)
                imported = _import(whole, out, limit, progress)
        else:
            imported = _import(source, out, limit, progress)
        check_tar(out)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return imported


def _import(
    source: _Readable, out: Path, limit: int, progress: Callable[[int], None] | None
) -> ImportedLayer:
    blob = CountedReader(source)
    size = 0
    with out.open("wb", buffering=0) as file, _Writer(file) as writer:
        for chunk in inflated(blob):
            size += len(chunk)
            if size > limit:
                raise LayerInvalid("blob", f"it inflates to more than {limit} bytes")
            writer.put(chunk)
            if progress is not None:
                progress(size)
    return ImportedLayer(blob.size, DiffID(writer.sha256.hexdigest()), size)


class _Readable(Protocol):
    def read(self, most: int, /) -> bytes: ...


class _GrowingSource:
    """A file that another process is writing, up to ``size`` bytes."""

    def __init__(self, file: _Readable, size: int) -> None:
        self._file, self._left = file, size
        self._never = threading.Event()

    def read(self, most: int, /) -> bytes:
        """Returns the next bytes and waits if there are none yet; empty at the end."""
        wait = FIRST_WAIT
        while self._left:
            chunk = self._file.read(min(most, self._left))
            if chunk:
                self._left -= len(chunk)
                return chunk
            # A growing file sends no event. The slower it grows, the less often it is checked.
            self._never.wait(wait)
            wait = min(2 * wait, MAX_WAIT)
        return b""


class CountedReader:
    """Reads a blob and counts its bytes."""

    def __init__(self, source: _Readable) -> None:
        self._source = source
        self.size = 0

    def read(self, most: int) -> bytes:
        """Returns up to ``most`` bytes; empty at the end."""
        chunk = self._source.read(most)
        self.size += len(chunk)
        return chunk


class _Writer:
    """Hashes and writes in its own thread, so that inflating has a core for itself. The thread
    starts with the second chunk: a small layer needs none. A context manager.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layer-writer")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._chunks.put(None)
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()
        if error[0] is None and self._error is not None:
            raise self._error

    def put(self, chunk: bytes) -> None:
        if self._error is not None:
            raise self._error
        if self._thread.ident is None and not self._chunks.empty():
            self._thread.start()
        self._chunks.put(chunk)

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            if self._error is not None:
                continue  # keeps emptying, so that put() never waits for ever
            try:
                self.sha256.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except BaseException as error:  # raised again by put() or at the end
                self._error = error


def inflated(blob: CountedReader) -> Iterator[bytes]:
    """Yields the blob's content in chunks (of CHUNK and GATHERED bytes at most, except for zstd).
    Raises LayerInvalid.
    """
    head = blob.read(READ)
    while 0 < len(head) < _MAGIC and (more := blob.read(READ)):
        head += more
    for magic, name in _REFUSED.items():
        if head.startswith(magic):
            raise LayerInvalid("blob", f"it is compressed with {name}, which is not supported")
    if head.startswith(_GZIP):
        return _gathered(_gunzipped(blob, head), MEMBER_BYTES)
    if head.startswith(_ZSTD) or _SKIPPABLE.match(head):
        return _gathered(_unzstd(blob, head), MEMBER_BYTES)
    if head.startswith(_BZIP2):
        return _gathered(_bunzipped(blob, head), STREAM_BYTES)
    return _plain(blob, head)


def _gathered(chunks: Iterator[bytes], each: int) -> Iterator[bytes]:
    """Joins small chunks. An empty one marks the end of a member, frame or stream; after the first
    MEMBERS, these must have ``each`` bytes on average.
    """
    members = size = waiting = 0
    parts: list[bytes] = []
    for chunk in chunks:
        if not chunk:
            members += 1
            if members > MEMBERS + size // each:
                raise LayerInvalid(
                    "blob",
                    f"it is compressed in pieces of less than {each} bytes on average:"
                    " compress it again, as one stream",
                )
            continue
        size += len(chunk)
        waiting += len(chunk)
        parts.append(chunk)
        if waiting >= GATHERED:
            yield b"".join(parts)
            parts, waiting = [], 0
    if parts:
        yield b"".join(parts)


def _plain(blob: CountedReader, head: bytes) -> Iterator[bytes]:
    while head:
        yield head
        head = blob.read(READ)


def _gunzipped(blob: CountedReader, given: bytes) -> Iterator[bytes]:
    read, at = memoryview(given), 0
    while at < len(read):  # one member a round
        member = isal_zlib.decompressobj(wbits=31)
        # Bytes behind a member's end are copied, so little is passed at first: members may have 20
        # bytes.
        most = MEMBER_READ
        while not member.eof:
            if at == len(read):
                read, at = memoryview(blob.read(READ)), 0
            part = read[at : at + most]
            try:
                chunk = member.decompress(part, CHUNK)
            except _GZIP_ERROR as error:
                damaged = blob.size - (len(read) - at)
                raise LayerInvalid(
                    "blob", f"its gzip data is damaged at byte {damaged} or after it"
                ) from error
            left = member.unused_data if member.eof else member.unconsumed_tail
            at += len(part) - len(left)
            most = min(2 * most, READ)
            if chunk:
                yield chunk
            elif not part and not member.eof:  # without input, there may still be output to fetch
                raise LayerInvalid("blob", "its gzip data is truncated")
        yield b""
        if at == len(read):
            read, at = memoryview(blob.read(READ)), 0


def _bunzipped(blob: CountedReader, given: bytes) -> Iterator[bytes]:
    read, at = memoryview(given), 0
    while at < len(read):  # one stream a round: pbzip2 writes many
        stream = bz2.BZ2Decompressor()
        most = MEMBER_READ
        while not stream.eof:
            part = read[:0]
            if stream.needs_input:
                if at == len(read):
                    read, at = memoryview(blob.read(READ)), 0
                part = read[at : at + most]
                if not part:
                    raise LayerInvalid("blob", "its bzip2 data is truncated")
                at += len(part)
                most = min(2 * most, READ)
            try:
                chunk = stream.decompress(part, CHUNK)
            except (OSError, ValueError) as error:
                damaged = blob.size - (len(read) - at)
                raise LayerInvalid(
                    "blob", f"its bzip2 data is damaged at byte {damaged} or before it"
                ) from error
            if chunk:
                yield chunk
        at -= len(stream.unused_data)
        yield b""
        if at == len(read):
            read, at = memoryview(blob.read(READ)), 0


def _unzstd(blob: CountedReader, given: bytes) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    read, at = memoryview(given), 0
    while at < len(read):  # one frame a round
        frame = decompressor.decompressobj()
        while not frame.eof:
            if at == len(read):
                read, at = memoryview(blob.read(READ)), 0
            part = read[at : at + ZSTD_READ]
            if not part:
                raise LayerInvalid("blob", "its zstd data is truncated")
            try:
                chunk = frame.decompress(part)
            except zstandard.ZstdError as error:
                damaged = blob.size - (len(read) - at - len(part))
                raise LayerInvalid(
                    "blob", f"its zstd data is damaged at byte {damaged} or before it"
                ) from error
            at += len(part) - len(frame.unused_data)
            if chunk:
                yield chunk
        yield b""
        if at == len(read):
            read, at = memoryview(blob.read(READ)), 0
