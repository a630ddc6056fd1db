"""The index of a layer tar: positions, sizes and names of its entries. ``tar.c`` walks the tar."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from obdelta.delta.kernel.binding import MappedFile, ffi, lib, owned
from obdelta.errors import LayerInvalid


class Member(NamedTuple):
    """One entry: headers in ``[start, content)``, stored bytes in ``[content, content + size)``,
    padding up to ``end``.
    """

    start: int
    content: int
    size: int
    end: int
    name: bytes
    type: str


SPARSE: int = lib.OD_SPARSE
"""Flag beside the type in an entry's last field: one of its headers marks a sparse file."""
_MEMBER = struct.Struct("=6Q2I")
"""The kernel's od_member."""


def walk(file: MappedFile) -> Any:
    """Returns the kernel's ``od_tar`` of a mapped file; never fails on any bytes (see its
    ``verdict``).
    """
    return owned(lib.od_tar_walk(file.at, file.size), lib.od_free_tar)


class Entries:
    """The entries of an ``od_tar`` in order. A :class:`Member` is made only when it is read,
    because layers have many.

    ``names`` are those of all entries.
    """

    def __init__(self, tar: Any) -> None:
        names = bytes(ffi.buffer(tar.names, tar.names_size)) if tar.names_size else b""
        self.fields: list[tuple[int, ...]] = list(
            _MEMBER.iter_unpack(
                ffi.buffer(tar.members, tar.count * _MEMBER.size) if tar.count else b""
            )
        )
        """For each: start, content, size, end, hash, its name's position and size, type, flags."""
        self.names = [names[name : name + size] for _, _, _, _, _, name, size, _ in self.fields]

    def __len__(self) -> int:
        return len(self.fields)

    def member(self, number: int, start: int = 0) -> Member:
        """Returns one entry; positions are counted from ``start``."""
        begin, content, size, end, _, _, _, kind = self.fields[number]
        return Member(
            start + begin, start + content, size, start + end, self.names[number], chr(kind & 0xFF)
        )


def ends(tar: Any) -> Iterator[int]:
    """Yields the end of each entry of an ``od_tar``."""
    entries = ffi.buffer(tar.members, tar.count * _MEMBER.size) if tar.count else b""
    return (fields[3] for fields in _MEMBER.iter_unpack(entries))


def check_tar(path: Path) -> None:
    """Raises LayerInvalid unless the file is a whole tar. As for engines, the zero blocks at the
    end may be missing.
    """
    file = MappedFile(path)
    try:
        tar = walk(file)
        if tar.verdict == lib.OD_TAR_TRUNCATED:
            raise LayerInvalid(
                "blob", f"its tar ends in the middle of an entry at byte {tar.stopped}"
            )
        if tar.verdict == lib.OD_TAR_BAD:
            raise LayerInvalid("blob", f"it is not a tar: no header at byte {tar.stopped}")
    finally:
        file.close()
