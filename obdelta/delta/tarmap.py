"""Where the entries of a layer tar lie. The walk itself is the kernel's (``_tar.c``)."""

from __future__ import annotations

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


def walk(file: MappedFile) -> Any:
    """The kernel's ``od_tar`` of a mapped file; never fails on any bytes (see its ``verdict``)."""
    return owned(lib.od_tar_walk(file.at, file.size), lib.od_free_tar)


def members(tar: Any) -> Iterator[Member]:
    """The entries of an ``od_tar``, in order."""
    names = ffi.buffer(tar.names, tar.names_size) if tar.names_size else b""
    for i in range(tar.count):
        m = tar.members[i]
        yield Member(m.start, m.content, m.size, m.end, bytes(names[m.name : m.name + m.name_size]), chr(m.type & 0xFF))


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
