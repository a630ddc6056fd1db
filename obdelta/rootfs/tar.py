"""Reads the members of a layer's tar as Go's ``archive/tar`` gives them to a container engine, with
names as bytes.

Sources: POSIX ustar and pax interchange formats; GNU tar's manual (long names, sparse formats 0.0,
0.1 and 1.0 in pax records). Entries that Docker's engine refuses in a layer (the old GNU sparse
type, unknown types) are refused here too: no device can hold such an image. Only headers are read.
Contents stay in the file, and a member has their position.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from obdelta.errors import LayerInvalid

BLOCK = 512
MAX_EXTENDED = 1 << 20
"""Maximum number of bytes of one pax header or GNU long name; Go has the same limit."""
MAX_EXTENTS = 1 << 16
"""Maximum number of pieces of one sparse file."""
EXTENTS, EXTENT_BYTES = 1_000, 512
"""Number of pieces that any sparse file may have, and the bytes of the file, holes included, for
which one more piece is allowed. GNU tar finds holes in blocks of 512 bytes, so it comes to half as
many.
"""
RECORDS, RECORD_BYTES = 1_000, 16
"""Number of records that any pax header may have, and the bytes for which one more record is
allowed. Headers with many records are those of sparse files, whose shortest records have 23 bytes.
"""

REGULAR, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)
_CONTENTLESS = (LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO)
_OLD_REGULAR, _PAX, _GLOBAL_PAX, _LONG_NAME, _LONG_LINK = b"\0", b"x", b"g", b"L", b"K"
_ZERO = bytes(BLOCK)
_OCTAL = re.compile(rb"[0-7]{1,21}")
_RECORD = re.compile(rb"([0-9]{1,19}) ([^=\0]+)=")
"""The begin of a pax record: its length and its key."""
_NEWLINE = ord("\n")
_NAMES = frozenset((b"path", b"linkpath", b"GNU.sparse.name"))
_PIECES = frozenset((b"GNU.sparse.offset", b"GNU.sparse.numbytes"))
_DECIMAL = re.compile(rb"(-?)([0-9]+)(?:\.([0-9]*))?")


class Extent(NamedTuple):
    """A piece of a file: ``length`` bytes at ``source`` in the tar belong at ``position`` in the
    file.
    """

    position: int
    source: int
    length: int


class Member(NamedTuple):
    """One member. ``size`` is the file's, with its holes; ``mtime`` is in nanoseconds, as in the
    header (it may be negative).
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    linkname: bytes
    major: int
    minor: int
    extents: tuple[Extent, ...]


def members(descriptor: int, what: object) -> Iterator[Member]:
    """Yields the members of an uncompressed tar from a descriptor that can be read at any position.
    ``what`` names the tar in errors.

    Global pax headers are skipped, as engines do. Raises LayerInvalid.
    """
    reader = _Reader(descriptor, what)
    pax: dict[bytes, bytes] = {}
    long_name = long_link = b""
    while True:
        header = reader.header()
        if header is None:
            if pax or long_name or long_link:
                raise LayerInvalid(what, "it ends after an extended header")
            return
        kind = header[156:157]
        size = reader.number(header[124:136], "size")
        if kind == _PAX:
            pax = _records(reader.extended(size), what)
        elif kind == _GLOBAL_PAX:
            reader.extended(size)
        elif kind == _LONG_NAME:
            long_name = reader.extended(size).partition(b"\0")[0]
        elif kind == _LONG_LINK:
            long_link = reader.extended(size).partition(b"\0")[0]
        else:
            yield reader.member(header, size, pax, long_name, long_link)
            pax, long_name, long_link = {}, b"", b""


class _Reader:
    def __init__(self, descriptor: int, what: object) -> None:
        self._descriptor, self._what = descriptor, what
        self._end = os.fstat(descriptor).st_size
        self._at = 0

    def header(self) -> bytes | None:
        """Returns the next header block after checking its checksum; None at the end of the
        archive.
        """
        if self._at >= self._end:  # Go accepts an archive without end blocks
            return None
        header = self._block()
        if header == _ZERO:
            if self._at < self._end and self._block() != _ZERO:
                raise LayerInvalid(self._what, "a header follows a single zero block")
            return None
        stated = self.number(header[148:156], "checksum")
        total = sum(header) - sum(header[148:156]) + 8 * 32
        if stated != total and stated != total - 256 * sum(
            byte > 127 for byte in header[:148] + header[156:]
        ):
            raise LayerInvalid(
                self._what, f"the header at byte {self._at - BLOCK} has a wrong checksum"
            )
        return header

    def _block(self) -> bytes:
        block = os.pread(self._descriptor, BLOCK, self._at)
        if len(block) != BLOCK:
            raise LayerInvalid(self._what, "it is truncated")
        self._at += BLOCK
        return block

    def extended(self, size: int) -> bytes:
        """Returns the content of an extended header."""
        if not 0 <= size <= MAX_EXTENDED:
            raise LayerInvalid(self._what, f"an extended header has {size} bytes")
        content = os.pread(self._descriptor, size, self._at)
        if len(content) != size:
            raise LayerInvalid(self._what, "it is truncated")
        self._at += -(-size // BLOCK) * BLOCK
        return content

    def number(self, field: bytes, of: str) -> int:
        """Parses octal text, or base 256 if the first bit is set (two's complement)."""
        if field[0] & 0x80:
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & ((1 << bits) - 1)
            value -= (value >> (bits - 1)) << bits
            if not -1 << 63 <= value < 1 << 63:
                raise LayerInvalid(self._what, f"a header has a {of} that is out of range")
            return value
        text = field.strip(b" \0").partition(b"\0")[0]
        if not text:
            return 0
        if _OCTAL.fullmatch(text) is None:
            raise LayerInvalid(self._what, f"a header has a {of} that is not a number")
        return int(text, 8)

    def member(
        self, header: bytes, size: int, pax: dict[bytes, bytes], long_name: bytes, long_link: bytes
    ) -> Member:
        """Returns one member from its headers; moves on behind its content."""
        what = self._what
        kind = header[156:157]
        name = header[:100].partition(b"\0")[0]
        posix = header[257:265] == b"ustar\x0000"
        if posix and (prefix := header[345:500].partition(b"\0")[0]):
            name = prefix + b"/" + name
        # In Go, GNU's long names win over pax records, and empty records count as absent.
        name = long_name or pax.get(b"path") or name
        linkname = long_link or pax.get(b"linkpath") or header[157:257].partition(b"\0")[0]
        size = _whole(pax, b"size", size, what)
        uid = _whole(pax, b"uid", self.number(header[108:116], "uid"), what)
        gid = _whole(pax, b"gid", self.number(header[116:124], "gid"), what)
        mtime = _nanoseconds(pax.get(b"mtime"), self.number(header[136:148], "mtime"), what)
        mode = self.number(header[100:108], "mode")
        ustar = header[257:262] == b"ustar"
        major = self.number(header[329:337], "device number") if ustar else 0
        minor = self.number(header[337:345], "device number") if ustar else 0
        if kind == _OLD_REGULAR:
            kind = DIRECTORY if name.endswith(b"/") else REGULAR
        if kind != REGULAR and kind not in _CONTENTLESS:
            raise LayerInvalid(what, f"a member has type {kind!r}, which engines refuse")
        extents: tuple[Extent, ...] = ()
        stored = 0 if kind in _CONTENTLESS else size
        if not 0 <= stored <= self._end - self._at:
            raise LayerInvalid(what, "a member reaches past its end")
        if kind == REGULAR:
            if sparse := _is_sparse(pax):
                name = pax.get(b"GNU.sparse.name") or name
                size, extents = self._sparse(pax, sparse, size)
            elif size:
                extents = (Extent(0, self._at, size),)
        else:
            size = 0
        self._at += -(-stored // BLOCK) * BLOCK
        return Member(name, kind, mode, uid, gid, size, mtime, linkname, major, minor, extents)

    def _sparse(
        self, pax: dict[bytes, bytes], form: bytes, stored: int
    ) -> tuple[int, tuple[Extent, ...]]:
        what, source = self._what, self._at
        real = pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size")
        size = _decimal(real, what) if real else stored
        most = min(MAX_EXTENTS, EXTENTS + size // EXTENT_BYTES)
        if form == b"1.0":
            numbers, used = self._sparse_map(stored, most)
            source += used
            stored -= used
        else:
            parts = [one for one in pax.get(b"GNU.sparse.map", b"").split(b",") if one]
            if len(parts) > 2 * most:
                raise LayerInvalid(what, "a sparse file has too many pieces")
            numbers = [_decimal(one, what) for one in parts]
        if not real:
            size = stored
        if len(numbers) % 2:
            raise LayerInvalid(what, "a sparse file's map is broken")
        extents, position = [], 0
        for begin, length in zip(numbers[::2], numbers[1::2], strict=True):
            if begin < position or length < 0 or begin + length > size:
                raise LayerInvalid(what, "a sparse file's map is broken")
            position = begin + length
            if length:
                extents.append(Extent(begin, source, length))
            source += length
            stored -= length
        if stored != 0:
            raise LayerInvalid(what, "a sparse file's map does not fit its content")
        return size, tuple(extents)

    def _sparse_map(self, stored: int, most: int) -> tuple[list[int], int]:
        """Reads the map that precedes the content in format 1.0: decimal lines in whole blocks."""
        text, used, numbers, wanted = b"", 0, [], -1
        while True:
            *lines, text = text.split(b"\n")
            numbers += [_decimal(line, self._what) for line in lines]
            if wanted < 0 and numbers:
                wanted = 1 + 2 * numbers[0]
                if not 0 <= numbers[0] <= most:
                    raise LayerInvalid(self._what, "a sparse file has too many pieces")
            if 0 <= wanted <= len(numbers):
                return numbers[1:wanted], used
            if used + BLOCK > stored or len(text) > BLOCK:
                raise LayerInvalid(self._what, "a sparse file's map is broken")
            text += os.pread(self._descriptor, BLOCK, self._at + used)
            used += BLOCK


def _is_sparse(pax: dict[bytes, bytes]) -> bytes:
    """Returns the format of a sparse file, b"" for others."""
    major, minor = pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor")
    if major == b"1" and minor == b"0":
        return b"1.0"
    if (major == b"0" and minor in (b"0", b"1")) or b"GNU.sparse.map" in pax:
        return b"0.1"
    return b""


def _records(content: bytes, what: object) -> dict[bytes, bytes]:
    """Parses pax records: ``LENGTH KEY=VALUE\\n``. The repeated offset/numbytes pairs of sparse
    format 0.0 become one map.
    """
    records: dict[bytes, bytes] = {}
    pieces: list[bytes] = []
    at, count, size = 0, 0, len(content)
    while at < size:
        count += 1
        if count > RECORDS + at // RECORD_BYTES:
            raise LayerInvalid(
                what, f"its pax records have less than {RECORD_BYTES} bytes on average"
            )
        begin = _RECORD.match(content, at)
        if begin is None:
            raise LayerInvalid(what, "a pax record has no length or no key, or its key holds a NUL")
        digits, key = begin.groups()
        start = begin.end()
        at += int(digits)
        value = content[start : at - 1]
        if not start < at <= size or content[at - 1] != _NEWLINE:
            raise LayerInvalid(what, "a pax record is broken")
        if key in _NAMES and b"\0" in value:
            raise LayerInvalid(what, "a pax record holds a NUL")
        if key in _PIECES:
            pieces.append(value)
        else:
            records[key] = value
    if pieces:
        records[b"GNU.sparse.map"] = b",".join(pieces)
    return records


def _decimal(text: bytes, what: object) -> int:
    if not text.isdigit() or len(text) > 19:
        raise LayerInvalid(what, "a pax record should be a number")
    return int(text)


def _whole(pax: dict[bytes, bytes], key: bytes, otherwise: int, what: object) -> int:
    """Returns a number from a record, or else the header's own."""
    text = pax.get(key)
    if not text:
        return otherwise
    return -_decimal(text[1:], what) if text.startswith(b"-") else _decimal(text, what)


def _nanoseconds(text: bytes | None, seconds: int, what: object) -> int:
    if not text:
        return seconds * 10**9
    match = _DECIMAL.fullmatch(text)
    if match is None or len(match[2]) > 19:
        raise LayerInvalid(what, "an mtime is not a number")
    value = int(match[2]) * 10**9 + int((match[3] or b"").ljust(9, b"0")[:9])
    return -value if match[1] else value
