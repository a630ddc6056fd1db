"""Response bodies: sends files with ranges, relays upstream responses, and cuts a connection when a
body fails.

Every copied body has a producer, so a slow device pauses its source and memory use stays flat.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from twisted.internet.interfaces import IPushProducer, ITCPTransport
from twisted.web.http import Request
from zope.interface import implementer

from obdelta.net.http_server import FEW, phrase_of
from obdelta.observability.request_id import HEADER
from obdelta.registry import ProxiedResponse

_LARGE_PIECE, _SMALL_PIECE = 7 << 14, 2 << 14
"""Piece sizes in bytes, whole TLS records: for few connections, and for more. Twisted hands the
first size to the kernel at once (128 KiB with TLS overhead). A slow connection holds one piece,
plus one in OpenSSL's buffer.
"""
_RANGE = re.compile(rb"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class RangeNotSatisfiable(Exception):
    """A syntactically valid range that lies outside the body (416)."""


def parse_range(header: bytes | None, size: int) -> tuple[int, int] | None:
    """Returns ``(start, length)`` of a single byte range within ``size`` bytes, or None for the
    whole body.

    Anything but one well-formed range is ignored, as RFC 9110 section 14.2 allows. The range unit
    is case-insensitive (section 14.1). Raises RangeNotSatisfiable.
    """
    if header is None:
        return None
    match = _RANGE.fullmatch(header.strip().replace(b" ", b"").lower())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        if length == 0:
            raise RangeNotSatisfiable
        return size - length, length
    start = int(match[1])
    end = min(int(match[2]), size - 1) if match[2] else size - 1
    if match[2] and int(match[2]) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable
    return start, end - start + 1


def single_range(request: Request) -> bytes | None:
    """Returns the ``Range`` header, or None if it is missing or occurs several times."""
    given = request.requestHeaders.getRawHeaders(b"range", [])
    return given[0] if len(given) == 1 else None


def wanted_range(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Returns the requested range, or None for the whole body. An ``If-Range`` with another
    validator means the whole body. Raises RangeNotSatisfiable.
    """
    condition = request.getHeader(b"if-range")
    if condition is not None and condition.strip() != etag.encode("ascii"):
        return None
    return parse_range(single_range(request), size)


def not_modified(request: Request, etag: str) -> bool:
    """Sets the ``etag`` header (quotes included). Answers 304 and returns True if ``If-None-Match``
    names it.
    """
    request.setHeader(b"etag", etag.encode("ascii"))
    known = (request.getHeader(b"if-none-match") or b"").split(b",")
    if not {etag.encode("ascii"), b"*"} & {tag.strip().removeprefix(b"W/") for tag in known}:
        return False
    request.setResponseCode(304)
    request.finish()
    return True


def send_range_head(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Sends status and headers of an immutable body of ``size`` bytes (GET and HEAD, ranges too).
    ``etag`` includes its quotes.

    Returns ``(start, length)`` of the body to send. Returns None if there is none; the request has
    then been ended.
    """
    request.setHeader(b"accept-ranges", b"bytes")
    if not_modified(request, etag):
        return None
    try:
        wanted = wanted_range(request, size, etag)
    except RangeNotSatisfiable:
        request.setResponseCode(416)
        request.setHeader(b"content-range", f"bytes */{size}".encode("ascii"))
        request.setHeader(b"content-length", b"0")
        request.finish()
        return None
    start, length = wanted if wanted is not None else (0, size)
    if wanted is not None:
        request.setResponseCode(206)
        request.setHeader(
            b"content-range", f"bytes {start}-{start + length - 1}/{size}".encode("ascii")
        )
    request.setHeader(b"content-length", str(length).encode("ascii"))
    if request.method == b"HEAD" or length == 0:
        request.finish()
        return None
    return start, length


class Insertion(NamedTuple):
    """Bytes inserted into the body before byte ``at`` of the file."""

    at: int
    content: bytes


def send_file(
    request: Request, path: Path, size: int, etag: str, insertion: Insertion | None = None
) -> None:
    """Sends a finished, immutable file of ``size`` bytes (GET and HEAD, ranges too) and ends the
    request.

    ``etag`` includes its quotes and identifies the body with its ``insertion``. Raises
    FileNotFoundError, before anything is written, if the file is missing or incomplete.
    """
    source = path.open("rb")
    if os.fstat(source.fileno()).st_size != size:
        source.close()
        raise FileNotFoundError(f"{path.name} does not have its {size} bytes")
    insertion = insertion or Insertion(size, b"")
    wanted = send_range_head(request, size + len(insertion.content), etag)
    if wanted is None:
        source.close()
    else:
        _FileBody(request, source, *wanted, insertion).begin()


@implementer(IPushProducer)
class _FileBody:
    """Sends ``left`` bytes of a file from ``at`` on at the device's pace, then ends the request."""

    def __init__(
        self, request: Request, source: BinaryIO, at: int, left: int, insertion: Insertion
    ) -> None:
        self._request, self._source, self._at, self._left = request, source, at, left
        self._insertion = insertion
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
        piece = self._read(min(_piece(self._request), self._left))
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


def _piece(request: Request) -> int:
    """Returns the bytes to write in one step. Each step costs time, so few connections get large
    pieces.
    """
    connections: int = getattr(getattr(request, "site", None), "open_connections", 1)
    return _LARGE_PIECE if connections <= FEW else _SMALL_PIECE


async def send_relayed(request: Request, response: ProxiedResponse) -> None:
    """Sends another server's response; its body streams at the device's pace."""
    request.setResponseCode(response.status, phrase_of(response.status))
    for name, values in response.headers.getAllRawHeaders():
        if name.lower() != HEADER:  # this server sets the request's own ID
            request.responseHeaders.setRawHeaders(name, values)
    if request.method == b"HEAD":
        response.cancel()
        request.finish()
        return
    try:
        await response.deliver(request)
    except BaseException:
        response.cancel()
        if request.startedWriting:
            # Only a cut connection shows the device that this body is incomplete.
            abort(request)
        raise
    request.finish()


def abort(request: Request) -> None:
    """Cuts the connection, so that an incomplete body does not look complete."""
    channel = request.channel
    if channel is not None and channel.transport is not None:
        cast(ITCPTransport, channel.transport).abortConnection()
