"""Layers with every kind of entry, and trees made of them, for tests of v2."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.images import Entry, Image, Layer, make_image, make_layer
from obdelta.oci import DiffID
from obdelta.rootfs.unpack import unpack

MTIME = 1_700_000_000


def entry(
    name: str | bytes,
    kind: bytes = tarfile.REGTYPE,
    content: bytes | None = None,
    *,
    link: str | bytes = "",
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    mtime: float = MTIME,
    device: tuple[int, int] = (0, 0),
    pax: dict[str, str] | None = None,
) -> Entry:
    """Returns any member of a tar; bytes that are no UTF-8 are written unchanged."""
    info = tarfile.TarInfo(_text(name))
    info.type, info.linkname, info.mode, info.mtime = kind, _text(link), mode, mtime
    info.uid, info.gid = owner
    info.devmajor, info.devminor = device
    info.pax_headers = dict(pax or {})
    if content is not None:
        info.size = len(content)
    return Entry(info, content)


def file(name: str | bytes, content: bytes = b"", **attributes: Any) -> Entry:
    """A regular file."""
    return entry(name, tarfile.REGTYPE, content, **attributes)


def directory(name: str | bytes, **attributes: Any) -> Entry:
    """A directory."""
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **attributes})


def symlink(name: str | bytes, target: str | bytes, **attributes: Any) -> Entry:
    """A symbolic link."""
    return entry(name, tarfile.SYMTYPE, link=target, **{"mode": 0o777, **attributes})


def hardlink(name: str | bytes, target: str | bytes, **attributes: Any) -> Entry:
    """A hard link."""
    return entry(name, tarfile.LNKTYPE, link=target, **attributes)


def device(
    name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE, **attributes: Any
) -> Entry:
    """A character (or block) device."""
    return entry(name, kind, device=(major, minor), **attributes)


def fifo(name: str, **attributes: Any) -> Entry:
    """A FIFO."""
    return entry(name, tarfile.FIFOTYPE, **attributes)


def whiteout(name: str | bytes, **attributes: Any) -> Entry:
    """Returns a whiteout: it hides a name of the layers below."""
    parent, slash, last = _text(name).rpartition("/")
    return file(f"{parent}{slash}.wh.{last}", **attributes)


def opaque(name: str) -> Entry:
    """Returns an opaque whiteout: it hides the entries that a directory has in the layers below."""
    return file(f"{name}/.wh..wh..opq")


def sparse(name: str, size: int, pieces: Sequence[tuple[int, bytes]], **attributes: Any) -> Entry:
    """A sparse file in pax format 1.0; pieces are ``(position, content)``."""
    numbers = [
        len(pieces),
        *(number for position, content in pieces for number in (position, len(content))),
    ]
    head = b"".join(b"%d\n" % number for number in numbers)
    body = head + bytes(-len(head) % 512) + b"".join(content for _, content in pieces)
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(size),
    }
    return entry(f"GNUSparseFile.0/{name}", tarfile.REGTYPE, body, pax=pax, **attributes)


def layer(entries: Iterable[Entry], blobs: Path) -> Layer:
    """Writes the entries in this order, uncompressed: the blob is the tar."""
    return make_layer(entries, blobs, compression="plain", tidy=False)


def image(
    layers: Sequence[Iterable[Entry]], root: Path, *, config: dict[str, Any] | None = None
) -> Image:
    """Returns an image of uncompressed layers; its layout and blobs are below ``root``."""
    return make_image(
        [layer(entries, root / "blobs") for entries in layers], root / "layout", config=config
    )


def tars(made: Image) -> list[tuple[DiffID, Path]]:
    """Returns the arguments of :func:`unpack` for the layers of an image."""
    assert all(one.compression == "plain" for one in made.layers)
    return [(one.diff_id, one.path) for one in made.layers]


def tree(made: Image, out: Path) -> Path:
    """Unpacks the image's root filesystem below ``out``."""
    unpack(tars(made), out)
    return out / "root"


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
