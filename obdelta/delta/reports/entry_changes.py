"""Finds why entries of a target layer cost many bytes: what changed, and what would save bytes.

Everything is derived while the layer's tars are mapped, and bounded: few entries of a layer are
examined, and of each only a sample. A verdict is a hint for people; nothing depends on it.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import zstandard

from obdelta.delta.tar_index import Member

TIMES, METADATA, MOVED, ARCHIVE, MEDIA, RANDOM, RECOMPILED, EDITED, NEW = (
    "timestamps",
    "metadata",
    "moved",
    "archive",
    "media",
    "random",
    "recompiled",
    "edited",
    "new",
)
MAX_ARCHIVES: Final = 3
"""Archives of a layer that are looked into."""
MIN_ARCHIVE: Final = 64 * 1024
"""Literal bytes from which an archive is looked into."""
_MAX_FILE: Final = 16 << 20
_MAX_INNER: Final = 1 << 20
_MAX_DIRECTORY: Final = 1 << 20
"""Bytes of a zip's directory that are read, some 20,000 entries."""
MAX_HEADER: Final = 64 << 10
"""Bytes of an entry's headers that are compared."""
_RANDOM_RATIO: Final = 0.985
"""Literals count as random if they deflate to this share of their size or more."""
_MIN_RANDOM: Final = 4096

_MAGIC: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"hsqs", "squashfs"),
    (b"sqsh", "squashfs"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"!<arch>\ndebian", "deb"),
    (b"\xed\xab\xee\xdb", "rpm"),
)
_MEDIA: Final = (
    b"\x89PNG\r\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"OggS",
    b"fLaC",
    b"wOF2",
    b"ID3",
    b"\x1a\x45\xdf\xa3",
)
_CODE: Final = (
    b"\x7fELF",
    b"\xca\xfe\xba\xbe",
    b"\x00asm",
    b"MZ",
    b"!<arch>\n",
    b"\xcf\xfa\xed\xfe",
)
_ZIPS: Final = ("jar", "whl", "war", "ear", "apk", "egg", "nupkg", "docx", "xlsx")
_EOCD: Final = struct.Struct("<4s4H2LH")
_PIECES: Final = re.compile(rb"[\n\0]+")


@dataclass(frozen=True, slots=True)
class Change:
    """A verdict: its ``kind``, the ``archive``'s format if it is one, and the share of the
    entry's delta bytes that its advice would save.
    """

    kind: str
    archive: str = ""
    saved: float = 0.0


def changed_entry(
    member: Member,
    content: memoryview,
    old: Member | None,
    old_content: memoryview | None,
    literal_ratio: Callable[[], float],
    *,
    look_inside: bool,
) -> Change:
    """Returns the verdict of an entry whose content is not in the base as a whole.

    ``old`` is the base entry that it is a new version of. ``literal_ratio`` returns the deflated
    share of the size of its literals, 0 if most of it is copied. ``look_inside``: whether to unpack
    samples of both archives.
    """
    head = bytes(content[:16])
    archive = _archive(head, member.name)
    if archive:
        saved = 0.0
        if look_inside and old_content is not None:
            saved = _saved_inside(archive, bytes_of(old_content), bytes_of(content))
        return Change(ARCHIVE, archive, saved)
    if head.startswith(_MEDIA) or head[4:8] == b"ftyp" or head[8:12] == b"WEBP":
        return Change(MEDIA)
    if old is not None and old_content is not None and _is_code(member, old, head, old_content):
        return Change(RECOMPILED)
    if member.size >= _MIN_RANDOM and literal_ratio() >= _RANDOM_RATIO:
        return Change(RANDOM)
    if old is None:
        return Change(NEW)
    return Change(EDITED)


def _is_code(member: Member, old: Member, head: bytes, old_content: memoryview) -> bool:
    if head.startswith(_CODE):
        return bytes(old_content[:4]) == head[:4]
    return member.name.endswith(b".pyc") and old.name.endswith(b".pyc")


def same_content(header: bytes, old: Member | None, old_header: bytes, member: Member) -> Change:
    """Returns the verdict of an entry whose content is in the base: ``old`` is the base entry of
    the same name and content, if there is one.
    """
    if old is None or old.name != member.name:
        return Change(MOVED)
    new_info, old_info = _parsed(header), _parsed(old_header)
    if new_info is None or old_info is None:
        return Change(METADATA)
    times = {"mtime", "atime", "ctime", "LIBARCHIVE.creationtime"}
    fields = ("name", "mode", "uid", "gid", "uname", "gname", "type", "linkname", "size")
    if any(getattr(new_info, name) != getattr(old_info, name) for name in fields):
        return Change(METADATA)
    new_pax, old_pax = (
        {key: value for key, value in info.pax_headers.items() if key not in times}
        for info in (new_info, old_info)
    )
    return Change(TIMES if new_pax == old_pax else METADATA)


def bytes_of(content: memoryview) -> bytes:
    """Returns as many bytes of an entry as are looked at."""
    return bytes(content[:_MAX_FILE])


def _archive(head: bytes, name: bytes) -> str:
    format_ = next((found for magic, found in _MAGIC if head.startswith(magic)), "")
    if format_ != "zip":
        return format_
    ending = name.rpartition(b".")[2].decode("ascii", "replace").lower()
    return ending if ending in _ZIPS else "zip"


def _parsed(header: bytes) -> tarfile.TarInfo | None:
    if len(header) > MAX_HEADER:
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(header + bytes(1024)), mode="r:") as tar:
            return tar.next()
    except (tarfile.TarError, ValueError, OverflowError):
        return None


# -- what is inside --------------------------------------------------------------------------


def _saved_inside(archive: str, old: bytes, new: bytes) -> float:
    """Returns the share of an archive that its base has too, unpacked: about that much would be
    saved if it were stored uncompressed.
    """
    try:
        if archive in ("zip", *_ZIPS):
            return _shared_of_zips(old, new)
        unpack = _UNPACKERS.get(archive)
        return 0.0 if unpack is None else shared(unpack(old), unpack(new))
    except (
        zlib.error,
        lzma.LZMAError,
        zstandard.ZstdError,
        zipfile.BadZipFile,
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ):
        return 0.0


def shared(old: bytes, new: bytes) -> float:
    """Returns the share of ``new`` in lines, or runs between zero bytes, that ``old`` has too."""
    if not new:
        return 0.0
    known, pieces = set(_PIECES.split(old)), _PIECES.split(new)
    total = sum(len(piece) + 1 for piece in pieces)
    return sum(len(piece) + 1 for piece in pieces if piece in known) / total


def _shared_of_zips(old: bytes, new: bytes) -> float:
    with _opened(old) as before, _opened(new) as after:
        known = {(one.CRC, one.file_size) for one in before.infolist()}
        by_name = {one.filename: one for one in before.infolist()}
        total = same = 0
        left = old_left = _MAX_INNER
        for one in after.infolist():
            total += one.compress_size
            if (one.CRC, one.file_size) in known:
                same += one.compress_size
            elif left > 0 and old_left > 0 and (base := by_name.get(one.filename)) is not None:
                content, old_content = (
                    _start_of(after, one, left),
                    _start_of(before, base, old_left),
                )
                same += int(one.compress_size * shared(old_content, content))
                left -= len(content)
                old_left -= len(old_content)
        return same / total if total else 0.0


def _opened(content: bytes) -> zipfile.ZipFile:
    """Returns a zip whose directory is small. Raises BadZipFile."""
    at = content.rfind(b"PK\x05\x06", -(65536 + _EOCD.size))
    if at < 0 or len(content) - at < _EOCD.size:
        raise zipfile.BadZipFile
    fields = _EOCD.unpack_from(content, at)
    if fields[5] > _MAX_DIRECTORY:
        raise zipfile.BadZipFile
    return zipfile.ZipFile(io.BytesIO(content))


def _start_of(zip_: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return b""  # zipfile unpacks the others without a bound
    with zip_.open(info) as file:
        # As many bytes are unpacked as are read, also if the entry says that it has fewer.
        return file.read(min(most, info.file_size))


def _gunzipped(content: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(content, _MAX_INNER)


def _unxz(content: bytes) -> bytes:
    return lzma.LZMADecompressor(memlimit=64 << 20).decompress(content, _MAX_INNER)


def _unbzip(content: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(content, _MAX_INNER)


def _unzstd(content: bytes) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(content) as reader:
        return bytes(reader.read(_MAX_INNER))


_UNPACKERS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "gzip": _gunzipped,
    "xz": _unxz,
    "bzip2": _unbzip,
    "zstd": _unzstd,
}
