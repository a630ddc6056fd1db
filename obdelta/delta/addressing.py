"""Bases of which a device's engine does not see the bytes that their layer tars have.

A copy command names a position in the concatenation of the base's layer tars. The engine does not keep these tars: it puts
them together again from the files that it unpacked. Measured on balena-engine 20.10.44, that goes wrong for

* sparse entries: the engine counts the file's logical size, so that everything behind the entry is shifted;
* regular files whose path leads through a symbolic link of the same layer: their bytes are read from where the link leads
  on the device, or from what overwrote them.

The full pull of such an image works. A delta from it would fail on the device at the end of the download, and be tried
again for ever, so none is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from obdelta.delta.build import LayerFile
from obdelta.delta.kernel import MappedFile, ffi
from obdelta.delta.tarmap import members, walk
from obdelta.errors import BaseUnusable

_BLOCK = 512
_REGULAR = frozenset("0\0" + "7")


def check_addressable(base: Sequence[LayerFile]) -> None:
    """Raises BaseUnusable for a base that an engine addresses otherwise than its tars lie."""
    for number, layer in enumerate(base, 1):
        file = MappedFile(layer.path)
        try:
            why = _why_not(file)
        finally:
            file.close()
        if why is not None:
            raise BaseUnusable(f"{why} (layer {number}, {layer.diff_id})")


def _why_not(file: MappedFile) -> str | None:
    tar = walk(file)
    links: set[bytes] = set()
    files: list[bytes] = []
    for member in members(tar):
        if member.type == "S":
            return "it has a sparse entry"
        # A PAX header stands before the entry's own block.
        if member.content - member.start > _BLOCK and file.size >= member.content:
            header = bytes(ffi.buffer(file.at + member.start, member.content - member.start))
            if b"GNU.sparse." in header:
                return "it has a sparse entry"
        name = _normal(member.name)
        if member.type == "2":
            links.add(name)
        elif member.type in _REGULAR and member.size:
            files.append(name)
    if links and any(parent in links for name in files for parent in _parents(name)):
        return "it has a file whose path leads through a symbolic link of the same layer"
    return None


def _normal(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _parents(name: bytes) -> list[bytes]:
    parts = name.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]
