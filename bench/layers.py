"""Layers: tars made of entries, streamed to disk and compressed; the same entries give the same
bytes, every time.

The tars are as Docker's engine writes them: Go's ``archive/tar``, ustar headers, pax records only
where ustar cannot hold a value, two zero blocks at the end and no padding behind them.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import zstandard

from obdelta.oci.digest import DiffID, Digest
from obdelta.oci.form import Form
from obdelta.oci.manifest import DOCKER_LAYER, OCI_LAYER, OCI_LAYER_GZIP

Compression = Literal["gzip", "zstd", "plain"]
Format = Literal["docker", "oci"]

MTIME = 1_700_000_000
"""The mtime of entries for which none is given."""
_CHUNK = 1 << 20


class Readable(Protocol):
    """The source of a member's content."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Entry(NamedTuple):
    """One member of a layer. ``content``: bytes, a file to read, a function that opens such a
    file, or None for no content; it has ``info.size`` bytes.
    """

    info: tarfile.TarInfo
    content: bytes | Path | Callable[[], Readable] | None = None


def file(
    name: str,
    content: bytes | Path,
    *,
    mode: int = 0o644,
    mtime: int = MTIME,
    uid: int = 0,
    gid: int = 0,
) -> Entry:
    """A regular file."""
    info = _info(name, tarfile.REGTYPE, mode, mtime, uid, gid)
    info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return Entry(info, content)


def directory(
    name: str, *, mode: int = 0o755, mtime: int = MTIME, uid: int = 0, gid: int = 0
) -> Entry:
    """A directory."""
    return Entry(_info(name, tarfile.DIRTYPE, mode, mtime, uid, gid))


def symlink(name: str, target: str, *, mtime: int = MTIME) -> Entry:
    """A symbolic link."""
    info = _info(name, tarfile.SYMTYPE, 0o777, mtime, 0, 0)
    info.linkname = target
    return Entry(info)


def hardlink(name: str, target: str, *, mtime: int = MTIME) -> Entry:
    """A hard link to an earlier member of the same layer (``target`` is its name)."""
    info = _info(name, tarfile.LNKTYPE, 0o644, mtime, 0, 0)
    info.linkname = target
    return Entry(info)


def whiteout(name: str) -> Entry:
    """Returns a whiteout: ``name`` in the layers below is gone."""
    parent, _, last = name.rpartition("/")
    return file(f"{parent}/.wh.{last}" if parent else f".wh.{last}", b"", mode=0)


def opaque(name: str) -> Entry:
    """Returns an opaque whiteout: everything in directory ``name`` of the layers below is gone."""
    return file(f"{name}/.wh..wh..opq", b"", mode=0)


def from_tree(
    root: Path, prefix: str = "", *, mtime: int | None = None, owner: tuple[int, int] = (0, 0)
) -> list[Entry]:
    """Yields everything under ``root``, with names below ``prefix`` and with hard links; mtimes
    are the files' own unless given.
    """
    entries: list[Entry] = []
    seen: dict[tuple[int, int], str] = {}
    for path in _walk(root):
        relative = path.relative_to(root).as_posix()
        name = f"{prefix}/{relative}" if prefix else relative
        status = path.lstat()
        info = _info(
            name,
            tarfile.REGTYPE,
            stat.S_IMODE(status.st_mode),
            mtime or int(status.st_mtime),
            *owner,
        )
        content: Path | None = None
        if stat.S_ISLNK(status.st_mode):
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
        elif stat.S_ISDIR(status.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISFIFO(status.st_mode):
            info.type = tarfile.FIFOTYPE
        elif (
            status.st_nlink > 1
            and (first := seen.setdefault((status.st_dev, status.st_ino), name)) != name
        ):
            info.type, info.linkname = tarfile.LNKTYPE, first
        else:
            info.size, content = status.st_size, path
        entries.append(Entry(info, content))
    return entries


def _walk(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _info(name: str, kind: bytes, mode: int, mtime: int, uid: int, gid: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.uid, info.gid = kind, mode, mtime, uid, gid
    return info


# -- layers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer. ``path`` is the blob that is transferred (``digest``, ``size``, bytes);
    ``diff_id`` is the hash of the tar inside.
    """

    path: Path
    digest: Digest
    size: int
    diff_id: DiffID
    tar_size: int
    compression: Compression

    def media_type(self, form: Format) -> str:
        """The media type in manifests of a format. Docker only has one, for gzip."""
        if form == "docker":
            return DOCKER_LAYER
        zstd = Form.ZSTD.traits.layer_type
        return {"gzip": OCI_LAYER_GZIP, "zstd": zstd, "plain": OCI_LAYER}[self.compression]

    def write_tar(self, out: Path) -> Path:
        """Inflates the layer to ``out`` and returns it."""
        with self.path.open("rb") as blob, out.open("wb") as tar:
            if self.compression == "gzip":
                with gzip.GzipFile(fileobj=blob) as inflated:
                    shutil.copyfileobj(inflated, tar, _CHUNK)
            elif self.compression == "zstd":
                zstandard.ZstdDecompressor().copy_stream(blob, tar)
            else:
                shutil.copyfileobj(blob, tar, _CHUNK)
        return out


def make_layer(
    entries: Iterable[Entry],
    directory: Path,
    *,
    compression: Compression = "gzip",
    level: int = 6,
    tidy: bool = True,
    tar_path: Path | None = None,
) -> Layer:
    """Writes a layer into ``directory`` (created if necessary) as ``<hex of its digest>``.

    ``tidy`` sorts the entries as Docker does (each directory before its content) and adds missing
    parents; without it they are written in the given order. ``tar_path``: also keep the
    uncompressed tar there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, prefix=".layer-")
    try:
        with (
            os.fdopen(handle, "wb") as file,
            tar_path.open("wb") if tar_path else io.BytesIO() as kept,
        ):
            blob = _HashingWriter(file)
            squeeze = _Squeezed(blob, compression, level)
            tar = _HashingWriter(squeeze, kept if tar_path else None)
            for entry in tidied(entries) if tidy else entries:
                _write_member(entry, tar)
            tar.write(bytes(2 * tarfile.BLOCKSIZE))
            squeeze.finish()
        digest = Digest(blob.sha256.hexdigest())
        path = Path(name).replace(directory / digest.hex)
    finally:
        Path(name).unlink(missing_ok=True)
    return Layer(path, digest, blob.count, DiffID(tar.sha256.hexdigest()), tar.count, compression)


def tidied(entries: Iterable[Entry]) -> list[Entry]:
    """Returns the entries sorted by path components, with missing parent directories; of entries
    with the same name the last one stays.
    """
    by_parts = {tuple(entry.info.name.strip("/").split("/")): entry for entry in entries}
    for parts in list(by_parts):
        for depth in range(1, len(parts)):
            if parts[:depth] not in by_parts:
                by_parts[parts[:depth]] = directory("/".join(parts[:depth]))
    for parts in sorted(by_parts):
        _link_backwards(parts, by_parts)
    return [by_parts[parts] for parts in sorted(by_parts)]


def _link_backwards(parts: tuple[str, ...], by_parts: dict[tuple[str, ...], Entry]) -> None:
    """Exchanges a hard link with its target if sorting has put the target after it."""
    link = by_parts[parts]
    target = tuple(link.info.linkname.strip("/").split("/"))
    if link.info.islnk() and target > parts and target in by_parts:
        info, content = by_parts[target]
        moved, left = copy.copy(info), copy.copy(link.info)
        moved.name, left.name, left.linkname = link.info.name, info.name, link.info.name
        by_parts[parts], by_parts[target] = Entry(moved, content), Entry(left)


def _write_member(entry: Entry, tar: _Writer) -> None:
    tar.write(entry.info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    written = 0
    if isinstance(entry.content, bytes):
        tar.write(entry.content)
        written = len(entry.content)
    elif entry.content is not None:
        with closing(
            entry.content.open("rb") if isinstance(entry.content, Path) else entry.content()
        ) as source:
            while chunk := source.read(_CHUNK):
                tar.write(chunk)
                written += len(chunk)
    if written != (entry.info.size if entry.content is not None else 0):
        raise ValueError(
            f"{entry.info.name}: {written} bytes of content, {entry.info.size} declared"
        )
    tar.write(bytes(-written % tarfile.BLOCKSIZE))


class _Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _HashingWriter:
    """Counts and hashes the bytes that pass."""

    def __init__(self, *out: _Writer | None) -> None:
        self.sha256, self.count, self._out = (
            hashlib.sha256(),
            0,
            [each for each in out if each is not None],
        )

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.count += len(data)
        for each in self._out:
            each.write(data)


class _Squeezed:
    """Compresses the bytes that pass; gzip with an empty header (no name, no time), so that it is
    deterministic.
    """

    def __init__(self, out: _Writer, compression: Compression, level: int) -> None:
        self._out = out
        self._crc_and_length: tuple[int, int] | None = None
        self._compressor: Any = None
        if compression == "gzip":
            out.write(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")
            self._compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
            self._crc_and_length = (0, 0)
        elif compression == "zstd":
            self._compressor = zstandard.ZstdCompressor(
                level=level, write_content_size=False
            ).compressobj()

    def write(self, data: bytes) -> None:
        if self._crc_and_length is not None:
            crc, length = self._crc_and_length
            self._crc_and_length = zlib.crc32(data, crc), length + len(data)
        self._out.write(self._compressor.compress(data) if self._compressor is not None else data)

    def finish(self) -> None:
        if self._compressor is not None:
            self._out.write(self._compressor.flush())
        if self._crc_and_length is not None:
            crc, length = self._crc_and_length
            self._out.write(crc.to_bytes(4, "little") + (length & 0xFFFFFFFF).to_bytes(4, "little"))
