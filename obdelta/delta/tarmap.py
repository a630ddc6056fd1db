"""Where the entries of a layer tar lie. The walk itself is the kernel's (``_tar.c``)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from obdelta.delta.kernel import MappedFile, ffi, lib, owned
from obdelta.errors import LayerInvalid


class Member(NamedTuple):
    """One entry: headers in ``[start, content)``, stored bytes in ``[content, content + size)``, padding up to ``end``."""

    start: int
    content: int
    size: int
    end: int
    name: bytes
    type: str


_MEMBER = struct.Struct("=6Q2I")
"""The kernel's od_member."""


def walk(file: MappedFile) -> Any:
    """The kernel's ``od_tar`` of a mapped file; never fails on any bytes (see its ``verdict``)."""
    return owned(lib.od_tar_walk(file.at, file.size), lib.od_free_tar)


def members(tar: Any, start: int = 0) -> Iterator[Member]:
    """The entries of an ``od_tar``, in order; positions are counted from ``start``."""
    names = bytes(ffi.buffer(tar.names, tar.names_size)) if tar.names_size else b""
    entries = ffi.buffer(tar.members, tar.count * _MEMBER.size) if tar.count else b""
    for begin, content, size, end, _hash, name, name_size, type_flag in _MEMBER.iter_unpack(entries):
        yield Member(
            start + begin, start + content, size, start + end, names[name : name + name_size], chr(type_flag & 0xFF)
        )


def ends(tar: Any) -> Iterator[int]:
    """Where each entry of an ``od_tar`` ends."""
    entries = ffi.buffer(tar.members, tar.count * _MEMBER.size) if tar.count else b""
    return (fields[3] for fields in _MEMBER.iter_unpack(entries))


def check_tar(path: Path) -> None:
    """Raises LayerInvalid unless the file is a whole tar (one without its zero blocks at the end will do, as for engines)."""
    file = MappedFile(path)
    try:
        tar = walk(file)
        if tar.verdict == lib.OD_TAR_TRUNCATED:
            raise LayerInvalid("blob", f"its tar ends in the middle of an entry at byte {tar.stopped}")
        if tar.verdict == lib.OD_TAR_BAD:
            raise LayerInvalid("blob", f"it is not a tar: no header at byte {tar.stopped}")
    finally:
        file.close()
