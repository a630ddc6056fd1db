"""Sends a range of a file at the pace of the client, and ends the request."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from twisted.internet.interfaces import IPushProducer
from twisted.web.http import Request
from zope.interface import implementer

from obdelta.net.http_limits import FEW_CONNECTIONS
from obdelta.store.growing_file import GrowingFile
from obdelta.web.request import abort

_LARGE_PIECE, _SMALL_PIECE = 7 << 14, 2 << 14
"""Piece sizes in bytes, whole TLS records: for few connections, and for more. Twisted hands the
first size to the kernel at once (128 KiB with TLS overhead). A slow connection holds one piece,
plus one in OpenSSL's buffer.
"""


class Insertion(NamedTuple):
    """Bytes inserted into the body before byte ``at`` of the file."""

    at: int
    content: bytes

    @property
    def end(self) -> int:
        """The position after it in the body."""
        return self.at + len(self.content)

    def in_file(self, position: int) -> int:
        """Returns the offset in the file for a position in the body."""
        return max(min(position, self.at), position - len(self.content))


NO_INSERTION = Insertion(0, b"")


class Pace(Protocol):
    """Follows how fast a client takes a whole body."""

    def wanted(self, sent: int) -> None:
        """Called when the connection wants more, with the bytes that it has taken so far."""

    def read(self) -> None:
        """Called when the wanted bytes have been read."""

    def finished(self) -> None:
        """Called when the connection has taken the last byte."""


@implementer(IPushProducer)
class FileBody:
    """Sends ``left`` bytes of a file from ``at`` on at the device's pace, then ends the
    request.
    """

    def __init__(
        self,
        request: Request,
        source: BinaryIO,
        at: int,
        left: int,
        insertion: Insertion,
        pace: Pace | None,
    ) -> None:
        self._request, self._source, self._at, self._left = request, source, at, left
        self._insertion, self._pace = insertion, pace
        self._paused = self._writing = self._over = False
        os.posix_fadvise(source.fileno(), at, left, os.POSIX_FADV_SEQUENTIAL)

    def begin(self) -> None:
        """Registers the producer and starts. The connection may pause or stop it at once."""
        self._request.registerProducer(cast(Any, self), True)
        if not self._paused:
            self.resumeProducing()

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        """Writes until the connection pauses this producer, which may happen from within
        a write.
        """
        self._paused = False
        if self._writing:
            return
        self._writing = True
        try:
            while not (self._paused or self._over):
                self._write()
        finally:
            self._writing = False
            if self._over:
                self._source.close()

    def _write(self) -> None:
        if self._pace is not None:
            self._pace.wanted(self._at)
        piece = self._read(min(_piece(self._request), self._left))
        if self._pace is not None:
            self._pace.read()
        if not piece:
            # The file was truncated while it was being sent.
            self.stopProducing()
            abort(self._request)
            return
        self._at += len(piece)
        self._left -= len(piece)
        self._request.write(piece)
        if not self._left and not self._over:
            self._over = True
            self._request.unregisterProducer()
            self._request.finish()
            if self._pace is not None:
                self._pace.finished()

    def _read(self, most: int) -> bytes:
        begin, content = self._insertion
        end = begin + len(content)
        if self._at >= end:
            return os.pread(self._source.fileno(), most, self._at - len(content))
        if self._at >= begin:
            return content[self._at - begin : self._at - begin + most]
        return os.pread(self._source.fileno(), min(most, begin - self._at), self._at)

    def stopProducing(self) -> None:
        self._over = True
        if not self._writing:
            self._source.close()


async def deliver_inserted(
    request: Request, file: GrowingFile, start: int, stop: int, insertion: Insertion
) -> None:
    """Sends bytes ``start`` to ``stop`` of a file with its insertion, while the file grows."""
    at, content = insertion
    if start < at:
        await file.deliver(request, start, min(stop, at))
    if inserted := content[max(0, start - at) : max(0, stop - at)]:
        request.write(inserted)
    if stop > insertion.end:
        await file.deliver(
            request, insertion.in_file(max(start, insertion.end)), insertion.in_file(stop)
        )


def _piece(request: Request) -> int:
    """Returns the bytes to write in one step. Each step costs time, so few connections get large
    pieces.
    """
    connections: int = getattr(getattr(request, "site", None), "open_connections", 1)
    return _LARGE_PIECE if connections <= FEW_CONNECTIONS else _SMALL_PIECE
