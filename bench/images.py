"""Container images made from files: the same entries give the same bytes, every time.

Layers are written as Docker's engine writes them (Go's ``archive/tar``: ustar headers, pax records only where ustar
cannot hold a value, two zero blocks at the end and no padding behind them), streamed to disk, and put into OCI image
layouts (OCI image specification, ``image-layout.md``), with Docker schema 2 or OCI manifests. :func:`push` carries a
layout's image into a registry (OCI distribution specification, blocking, plain HTTP or HTTPS).

The layouts lie as obdelta's embedded upstream ``oci:DIR`` wants them: one layout a repository at
``DIR/<repository>/``, tags as ``org.opencontainers.image.ref.name`` annotations of ``index.json``.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import zstandard

from obdelta.oci.digest import DiffID, Digest
from obdelta.oci.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
)

Compression = Literal["gzip", "zstd", "plain"]
Format = Literal["docker", "oci"]

MTIME = 1_700_000_000
"""The mtime of entries that nobody gave one."""
CREATED = "2023-11-14T22:13:20Z"
REF_NAME = "org.opencontainers.image.ref.name"
_CHUNK = 1 << 20


class Readable(Protocol):
    """What a member's content is read from."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Entry(NamedTuple):
    """One member of a layer.

    ``content`` is bytes, a file to read, what opens such a file, or None for no content; it has ``info.size`` bytes.
    """

    info: tarfile.TarInfo
    content: bytes | Path | Callable[[], Readable] | None = None


def file(
    name: str, content: bytes | Path, *, mode: int = 0o644, mtime: int = MTIME, uid: int = 0, gid: int = 0
) -> Entry:
    """A regular file."""
    info = _info(name, tarfile.REGTYPE, mode, mtime, uid, gid)
    info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return Entry(info, content)


def directory(name: str, *, mode: int = 0o755, mtime: int = MTIME, uid: int = 0, gid: int = 0) -> Entry:
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
    """Says that ``name`` of the layers below is gone."""
    parent, _, last = name.rpartition("/")
    return file(f"{parent}/.wh.{last}" if parent else f".wh.{last}", b"", mode=0)


def opaque(name: str) -> Entry:
    """Says that everything in directory ``name`` of the layers below is gone."""
    return file(f"{name}/.wh..wh..opq", b"", mode=0)


def from_tree(
    root: Path, prefix: str = "", *, mtime: int | None = None, owner: tuple[int, int] = (0, 0)
) -> list[Entry]:
    """Everything under ``root``, named below ``prefix``, with hard links; mtimes are the files' own unless given."""
    entries: list[Entry] = []
    seen: dict[tuple[int, int], str] = {}
    for path in _walk(root):
        relative = path.relative_to(root).as_posix()
        name = f"{prefix}/{relative}" if prefix else relative
        status = path.lstat()
        info = _info(name, tarfile.REGTYPE, stat.S_IMODE(status.st_mode), mtime or int(status.st_mtime), *owner)
        content: Path | None = None
        if stat.S_ISLNK(status.st_mode):
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
        elif stat.S_ISDIR(status.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISFIFO(status.st_mode):
            info.type = tarfile.FIFOTYPE
        elif status.st_nlink > 1 and (first := seen.setdefault((status.st_dev, status.st_ino), name)) != name:
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


# -- layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """``path`` is the blob as it travels (``digest``, ``size``, bytes); the tar inside is what ``diff_id`` hashes."""

    path: Path
    digest: Digest
    size: int
    diff_id: DiffID
    tar_size: int
    compression: Compression

    def media_type(self, form: Format) -> str:
        """As manifests of that format name it. (Docker has no name for other than gzip and says gzip.)"""
        if form == "docker":
            return DOCKER_LAYER
        return {"gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD, "plain": OCI_LAYER}[self.compression]

    def write_tar(self, out: Path) -> Path:
        """Inflates the layer to ``out`` and gives it back."""
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
    """Writes a layer into ``directory`` (made if need be) as ``<hex of its digest>``.

    ``tidy`` sorts the entries as Docker does (each directory followed by what is in it) and adds parents that are
    missing; without it they are written as they come. ``tar_path``: also keep the uncompressed tar there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, prefix=".layer-")
    try:
        with os.fdopen(handle, "wb") as file, tar_path.open("wb") if tar_path else io.BytesIO() as kept:
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
    """Sorted by path components, later ones of the same name winning, with missing parent directories added."""
    by_parts = {tuple(entry.info.name.strip("/").split("/")): entry for entry in entries}
    for parts in list(by_parts):
        for depth in range(1, len(parts)):
            if parts[:depth] not in by_parts:
                by_parts[parts[:depth]] = directory("/".join(parts[:depth]))
    for parts in sorted(by_parts):
        _link_backwards(parts, by_parts)
    return [by_parts[parts] for parts in sorted(by_parts)]


def _link_backwards(parts: tuple[str, ...], by_parts: dict[tuple[str, ...], Entry]) -> None:
    """Exchanges a hard link with its target where sorting has put the target behind it."""
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
        with closing(entry.content.open("rb") if isinstance(entry.content, Path) else entry.content()) as source:
            while chunk := source.read(_CHUNK):
                tar.write(chunk)
                written += len(chunk)
    if written != (entry.info.size if entry.content is not None else 0):
        raise ValueError(f"{entry.info.name}: {written} bytes of content, {entry.info.size} declared")
    tar.write(bytes(-written % tarfile.BLOCKSIZE))


class _Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _HashingWriter:
    """Counts and hashes what goes by."""

    def __init__(self, *out: _Writer | None) -> None:
        self.sha256, self.count, self._out = hashlib.sha256(), 0, [each for each in out if each is not None]

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.count += len(data)
        for each in self._out:
            each.write(data)


class _Squeezed:
    """Compresses what goes by; gzip with an empty header (no name, no time), so that it is deterministic."""

    def __init__(self, out: _Writer, compression: Compression, level: int) -> None:
        self._out = out
        self._crc_and_length: tuple[int, int] | None = None
        self._compressor: Any = None
        if compression == "gzip":
            out.write(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")
            self._compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
            self._crc_and_length = (0, 0)
        elif compression == "zstd":
            self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=False).compressobj()

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


# -- images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an OCI layout. ``layers`` bottom to top; ``image_id`` is the digest of ``config``."""

    layout: Path
    name: str
    manifest: bytes
    media_type: str
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> Digest:
        """Of the manifest."""
        return Digest.of(self.manifest)

    @property
    def image_id(self) -> Digest:
        """Of the config."""
        return Digest.of(self.config)

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """Bottom to top."""
        return tuple(layer.diff_id for layer in self.layers)


def make_image(
    layers: Sequence[Layer],
    layout: Path,
    *,
    name: str = "latest",
    format: Format = "docker",
    architecture: str = "amd64",
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
) -> Image:
    """Puts an image of these layers into the OCI layout at ``layout`` (made if need be) under tag ``name``.

    ``config`` is merged over the config's top level. An older image of the same name loses the name.
    """
    blobs = _open_layout(layout)
    for layer in layers:
        if not (path := blobs / layer.digest.hex).exists():
            try:
                path.hardlink_to(layer.path)
            except OSError:  # another file system
                shutil.copyfile(layer.path, path)
    value = {
        "architecture": architecture,
        "os": "linux",
        "created": CREATED,
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"], "Labels": labels or {}},
        "history": [{"created": CREATED, "created_by": f"layer {number}"} for number in range(len(layers))],
        "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in layers]},
        **(config or {}),
    }
    raw_config = _json(value)
    config_digest = _put(blobs, raw_config)
    media_type = DOCKER_MANIFEST if format == "docker" else OCI_MANIFEST
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {
                "mediaType": DOCKER_CONFIG if format == "docker" else OCI_CONFIG,
                "size": len(raw_config),
                "digest": str(config_digest),
            },
            "layers": [
                {"mediaType": layer.media_type(format), "size": layer.size, "digest": str(layer.digest)}
                for layer in layers
            ],
        }
    )
    _put(blobs, manifest)
    _name(layout, manifest, media_type, name)
    return Image(layout, name, manifest, media_type, raw_config, tuple(layers))


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """A manifest list (Docker) or index (OCI) over images of the same layout."""

    layout: Path
    name: str
    manifest: bytes
    media_type: str
    images: tuple[Image, ...]

    @property
    def digest(self) -> Digest:
        """Of the index."""
        return Digest.of(self.manifest)


def make_index(
    images: Sequence[tuple[Image, dict[str, str]]], layout: Path, *, name: str = "latest", format: Format = "docker"
) -> ImageIndex:
    """An index over images that lie in the same layout, each with its platform (``{"os": …, "architecture": …}``)."""
    blobs = _open_layout(layout)
    media_type = DOCKER_LIST if format == "docker" else OCI_INDEX
    manifests = [
        {"mediaType": image.media_type, "size": len(image.manifest), "digest": str(image.digest), "platform": platform}
        for image, platform in images
    ]
    raw = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})
    _put(blobs, raw)
    _name(layout, raw, media_type, name)
    return ImageIndex(layout, name, raw, media_type, tuple(image for image, _ in images))


def _open_layout(layout: Path) -> Path:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return blobs


def _name(layout: Path, manifest: bytes, media_type: str, name: str) -> None:
    path = layout / "index.json"
    entries = json.loads(path.read_bytes())["manifests"] if path.exists() else []
    entries = [entry for entry in entries if entry.get("annotations", {}).get(REF_NAME) != name]
    entries.append(
        {
            "mediaType": media_type,
            "size": len(manifest),
            "digest": str(Digest.of(manifest)),
            "annotations": {REF_NAME: name},
        }
    )
    fresh = path.with_suffix(".new")
    fresh.write_bytes(_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}))
    fresh.replace(path)


def _put(blobs: Path, content: bytes) -> Digest:
    digest = Digest.of(content)
    (blobs / digest.hex).write_bytes(content)
    return digest


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# -- push -------------------------------------------------------------------------------------------------------


class PushFailed(Exception):
    """The registry did not take a blob or manifest."""


def push(
    image: Image | ImageIndex,
    registry: str,
    repository: str,
    tag: str | None = None,
    *,
    authorization: str | None = None,
) -> Digest:
    """Pushes to ``registry`` (``http://host:port``); gives the manifest's digest back.

    ``tag`` None: the image's name.

    ``authorization`` is the header's whole value (``Bearer …``, ``Basic …``). Raises PushFailed, OSError.
    """
    url = urllib.parse.urlsplit(registry)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.netloc, timeout=300)
    headers = {"Authorization": authorization} if authorization else {}
    pusher = _Pusher(connection, f"/v2/{repository}", headers)
    try:
        if isinstance(image, ImageIndex):
            for child in image.images:
                pusher.image(child, str(child.digest))
        else:
            pusher.blobs(image)
        pusher.manifest(image.manifest, image.media_type, tag or image.name)
    finally:
        connection.close()
    return image.digest


class _Pusher:
    def __init__(self, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> None:
        self._connection, self._path, self._headers = connection, path, headers

    def image(self, image: Image, selector: str) -> None:
        self.blobs(image)
        self.manifest(image.manifest, image.media_type, selector)

    def blobs(self, image: Image) -> None:
        for layer in image.layers:
            with layer.path.open("rb") as content:
                self._blob(layer.digest, layer.size, content)
        self._blob(image.image_id, len(image.config), io.BytesIO(image.config))

    def manifest(self, raw: bytes, media_type: str, selector: str) -> None:
        self._ask("PUT", f"{self._path}/manifests/{selector}", (201,), raw, {"Content-Type": media_type})

    def _blob(self, digest: Digest, size: int, content: BinaryIO) -> None:
        if self._ask("HEAD", f"{self._path}/blobs/{digest}", (200, 404))[0] == 200:
            return
        location = urllib.parse.urlsplit(self._ask("POST", f"{self._path}/blobs/uploads/", (202,))[1])
        query = f"{location.query}&digest={digest}" if location.query else f"digest={digest}"
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self._ask("PUT", f"{location.path}?{query}", (201,), content, headers)

    def _ask(
        self,
        method: str,
        path: str,
        expected: tuple[int, ...],
        body: bytes | BinaryIO | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        self._connection.request(method, path, body, {**self._headers, **(headers or {})})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status not in expected:
            reason = answer[:200].decode("utf-8", "replace")
            raise PushFailed(f"{method} {path.partition('?')[0]}: status {response.status} {reason}")
        return response.status, response.headers.get("Location", "")
