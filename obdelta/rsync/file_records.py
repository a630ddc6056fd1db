"""Counts the bytes that each file takes in a batch, from rsync's records as they pass. The counts
are exact, and nothing is inflated.

After the lists of files and names, a batch has a record for each file whose content or attributes
differ. Source: rsync's ``rsync.c``, ``receiver.c`` and ``token.c`` as they read protocol 31 with
the options of :mod:`obdelta.rsync.batch`; there is no other documentation. The result decides
nothing: the proof decides whether a batch is good.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator, Iterator
from typing import NamedTuple

_DONE = 0
_NEGATIVE, _LARGE = 0xFF, 0xFE
_BASIS, _NAMED, _LOCAL, _SENT = 1 << 11, 1 << 12, 1 << 14, 1 << 15
_SUMS = struct.Struct("<4i")
_CHECKSUM = 16
_LITERAL, _RELATIVE, _RUN = 0x40, 0x80, 0x40
_END, _LONG, _LONG_RUN = 0, 0x20, 0x21
_WITHOUT_RUN = frozenset([_LONG, *range(_RELATIVE, _RELATIVE | _RUN)])
_MAX_TOKEN = 7
"""Bytes: a flag, a number, the length of a run."""
_MAX_NAME = 4096


class Transfer(NamedTuple):
    """One file's record: its bytes in the batch with those of its index, the bytes that it copies
    from the base's file, and in how many runs.

    ``sent`` is false for a hard link that rsync's output does not distinguish from a file (see
    :func:`obdelta.rsync.batch.sent`).
    """

    wire_bytes: int
    copied_bytes: int
    copies: int
    sent: bool = True


class Transfers:
    """Reads records as they arrive, in any chunking. ``found`` has those of files, in rsync's
    order; its consumer removes them.

    ``unreadable`` becomes true at the first unexpected byte; after that, nothing is read.
    ``beyond`` is the number of bytes after the last record and the end of the records' two phases.
    ``sent_index`` is the last file whose content was sent, by its number in rsync's list; None
    if there is none.
    """

    def __init__(self) -> None:
        self.found: deque[Transfer] = deque()
        self.unreadable = False
        self.beyond = 0
        self.sent_index: int | None = None
        self._number = -1
        self._pending = bytearray()
        self._at = 0
        self._skip = 0
        self._over = False
        self._reading = self._records()
        self._needed = next(self._reading)

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes."""
        if self._over:
            self.beyond += len(piece)
            return
        self._pending += piece
        try:
            while not self._over:
                self._skipped()
                if self._skip or len(self._pending) - self._at < self._needed:
                    break
                self._needed = next(self._reading)
        except StopIteration:
            self._over = True
        except ValueError:
            self._over = self.unreadable = True
        del self._pending[: self._at]
        self._at = 0
        if self._over:
            self.beyond = len(self._pending)

    def _skipped(self) -> None:
        skipped = min(self._skip, len(self._pending) - self._at)
        self._at += skipped
        self._skip -= skipped

    # Generators, so that they may wait anywhere: they yield the number of bytes that they need, and
    # continue when these are there.

    def _take(self, count: int) -> bytes:
        taken = bytes(self._pending[self._at : self._at + count])
        self._at += count
        return taken

    def _records(self) -> Iterator[int]:
        # Files are sent in two phases; the end of the batch follows them.
        for _ in range(2):
            while True:
                yield 1
                (first,) = self._take(1)
                if first == _DONE:
                    break
                yield from self._record(first)

    def _record(self, first: int) -> Iterator[int]:
        size = yield from self._index(first)
        yield 2
        flags = int.from_bytes(self._take(2), "little")
        size += 2
        if flags & _BASIS:
            yield 1
            self._take(1)
            size += 1
        named = 0
        if flags & _NAMED:
            yield 1
            (named,) = self._take(1)
            size += 1
            if named & 0x80:
                yield 1
                named = (named & 0x7F) << 8 | self._take(1)[0]
                size += 1
            if named > _MAX_NAME:
                raise ValueError("a name's length")
            yield named
            self._take(named)
            size += named
        if flags & _SENT:
            self.sent_index = self._number
            yield _SUMS.size
            yield from self._tokens(size + _SUMS.size, *_SUMS.unpack(self._take(_SUMS.size)))
        elif flags & _NAMED and flags & _LOCAL and not named:
            self.found.append(Transfer(size, 0, 0, sent=False))

    def _index(self, first: int) -> Generator[int, None, int]:
        """Reads an index and returns its length. Small indexes count from the last one."""
        if first == _NEGATIVE:
            raise ValueError("an index below 0")
        if first != _LARGE:
            self._number += first
            return 1
        yield 2
        high, low = self._take(2)
        if not high & 0x80:
            self._number += high << 8 | low
            return 3
        yield 2
        middle = self._take(2)
        self._number = (high & 0x7F) << 24 | middle[1] << 16 | middle[0] << 8 | low
        return 5

    def _tokens(self, size: int, count: int, block: int, _: int, last: int) -> Iterator[int]:
        """Yields lengths of literal data, and runs of the base's ``count`` blocks; the last block
        has ``last`` bytes, if not 0.
        """
        if count < 0 or block < 0 or not 0 <= last <= block:
            raise ValueError("sums")
        token = copied = copies = 0
        pending, at = self._pending, self._at
        while True:
            # Does not yield while the longest token is there: there are hundreds of thousands of
            # tokens.
            if len(pending) - at < _MAX_TOKEN:
                self._at = at
                yield 1
                yield self._length(pending[self._at])
                at = self._at
            flag = pending[at]
            if not flag:
                break
            if flag & 0xC0 == _LITERAL:
                length = (flag & 0x3F) << 8 | pending[at + 1]
                size += 2 + length
                at += 2 + length
                if at > len(pending):
                    self._at, self._skip = len(pending), at - len(pending)
                    yield 0
                    at = self._at
                continue
            length = self._length(flag)
            size += length
            token = (
                token + (flag & 0x3F)
                if flag & _RELATIVE
                else int.from_bytes(pending[at + 1 : at + 5], "little", signed=True)
            )
            at += length
            first = token
            if flag in _WITHOUT_RUN:
                copied += block
            else:
                token += pending[at - 2] | pending[at - 1] << 8
                copied += (token - first + 1) * block
            if not 0 <= first <= token < count:
                raise ValueError("a block that the base does not have")
            if last and token == count - 1:
                copied -= block - last
            copies += 1
        self._at = at
        yield 1 + _CHECKSUM
        self._take(1 + _CHECKSUM)
        self.found.append(Transfer(size + 1 + _CHECKSUM, copied, copies))

    @staticmethod
    def _length(flag: int) -> int:
        """Returns the length of a token, without the bytes that are skipped. Raises ValueError for
        an unknown one.
        """
        if flag & 0xC0 == _LITERAL:
            return 2
        if flag & _RELATIVE:
            return 3 if flag & _RUN else 1
        if flag not in (_END, _LONG, _LONG_RUN):
            raise ValueError("a flag")
        return {_END: 1, _LONG: 5, _LONG_RUN: 7}[flag]
