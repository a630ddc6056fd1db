"""Parses rsync's file list at the start of a batch, to find where the list ends.

Source: rsync's ``flist.c`` as it reads protocol 31 with the options of :mod:`obdelta.rsync.batch`;
there is no other documentation. Names are skipped: only their lengths matter.
"""

from __future__ import annotations

import stat

from obdelta.errors import BatchInvalid
from obdelta.rsync import varint

_SAME_MODE, _EXTENDED, _SAME_UID, _SAME_GID = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_SAME_NAME, _LONG_NAME, _SAME_TIME = 1 << 5, 1 << 6, 1 << 7
_SAME_MAJOR, _LINKED, _NAMES = 1 << 8, 1 << 9, 1 << 10 | 1 << 11
_FIRST_LINK, _NANOSECONDS, _UNKNOWN = 1 << 12, 1 << 13, 1 << 14 | 1 << 15
_ERROR_END = _EXTENDED | 1 << 12
_CHECKSUM = 16
_MAX_ENTRY = 1 << 14
"""More bytes than any entry has: two paths of 4096 and some numbers."""


class FileList:
    """Reads entries as they arrive. ``entries`` and ``size`` count all files and links read so far,
    as rsync does.
    """

    def __init__(self) -> None:
        self.entries = 0
        self.size = 0
        self._mode = 0
        self._firsts: dict[
            int, tuple[int, int]
        ] = {}  # of hard links: number of the first to (mode, size)

    def feed(self, buffer: bytes | bytearray) -> tuple[int, bool]:
        """Returns ``(bytes used, whether the list has ended)``. The caller passes the unused bytes
        again, with more. Raises BatchInvalid.
        """
        at = 0
        while True:
            try:
                end = self._entry(buffer, at)
            except IndexError:
                if len(buffer) - at > _MAX_ENTRY:
                    raise BatchInvalid("its file list cannot be read") from None
                return at, False
            except ValueError as error:
                raise BatchInvalid("its file list cannot be read") from error
            if end < 0:
                return -end, True
            at = end

    def _entry(self, buffer: bytes | bytearray, at: int) -> int:
        """Returns where the next entry begins; at the list's end, the negative of the position
        after it.
        """
        flags = buffer[at]
        at += 1
        if not flags:
            return -at
        if flags & _EXTENDED:
            flags |= buffer[at] << 8
            at += 1
            if flags == _ERROR_END:
                raise BatchInvalid("rsync could not read all of the target tree")
        if flags & (_NAMES | _UNKNOWN):
            raise BatchInvalid("its file list has flags that do not belong there")
        if flags & _SAME_NAME:
            at += 1
        if flags & _LONG_NAME:
            length, at = varint.read_varint(buffer, at)
        else:
            length, at = buffer[at], at + 1
        if not 0 <= length <= 4096:
            raise ValueError("a name's length")
        at += length
        if flags & _LINKED and not flags & _FIRST_LINK:
            number, at = varint.read_varint(buffer, at)
            if number not in self._firsts:
                raise ValueError("a hard link to an entry that is no first link")
            mode, size = self._firsts[number]
        else:
            mode, size, at = self._attributes(buffer, at, flags)
            if flags & _LINKED:
                self._firsts[self.entries] = (mode, size)
        if at > len(buffer):
            raise IndexError
        self._mode = mode
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            self.size += size
        self.entries += 1
        return at

    def _attributes(self, buffer: bytes | bytearray, at: int, flags: int) -> tuple[int, int, int]:
        """Returns ``(mode, size, end)``."""
        size, at = varint.read_varlong(buffer, at, 3)
        if not flags & _SAME_TIME:
            _, at = varint.read_varlong(buffer, at, 4)
        if flags & _NANOSECONDS:
            _, at = varint.read_varint(buffer, at)
        mode = self._mode
        if not flags & _SAME_MODE:
            mode, at = varint.read_int(buffer, at)
            if not 0 <= mode <= 0o177777:
                raise ValueError("a mode")
        if not flags & _SAME_UID:
            _, at = varint.read_varint(buffer, at)
        if not flags & _SAME_GID:
            _, at = varint.read_varint(buffer, at)
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            if not flags & _SAME_MAJOR:
                _, at = varint.read_varint(buffer, at)
            _, at = varint.read_varint(buffer, at)
        elif stat.S_ISLNK(mode):
            length, at = varint.read_varint(buffer, at)
            if not 0 < length <= 4096:
                raise ValueError("a link's length")
            at += length
        elif stat.S_ISREG(mode):
            at += _CHECKSUM
        elif not (stat.S_ISDIR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise ValueError("a mode")
        return mode, size, at
