"""Bodies: ranges of files, and errors that end a body.

Whatever is copied here has a producer, so that a slow device pauses its source and memory stays
flat.
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
"""Bytes, whole records of TLS: for few connections, and for more. The first is what Twisted hands
to the kernel at once (128 KiB, with what TLS adds). A connection that is slow holds one piece, and
one more in OpenSSL's buffer.
"""
_RANGE = re.compile(rb"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class RangeNotSatisfiable(Exception):
    """A syntactically right range that lies outside of the body (416)."""


def parse_range(header: bytes | None, size: int) -> tuple[int, int] | None:
    """``(start, length)`` of a single byte range within ``size`` bytes, or None for the whole body.

    What is not a single well-formed range is ignored, several ranges too, as RFC 9110 section 14.2
    lets a server do. The unit is told whatever its case (section 14.1).
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
    """The ``Range`` header; None where there are several, which are as good as none."""
    given = request.requestHeaders.getRawHeaders(b"range", [])
    return given[0] if len(given) == 1 else None


def wanted_range(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """The range that a request asks for, ``If-Range`` minded: a validator that is not ours means
    the whole body.
    """
    condition = request.getHeader(b"if-range")
    if condition is not None and condition.strip() != etag.encode("ascii"):
        return None
    return parse_range(single_range(request), size)


def not_modified(request: Request, etag: str) -> bool:
    """Sets ``etag`` (with its quotes); where the device holds that already (``If-None-Match``),
    answers 304: True.
    """
    request.setHeader(b"etag", etag.encode("ascii"))
    known = (request.getHeader(b"if-none-match") or b"").split(b",")
    if not {etag.encode("ascii"), b"*"} & {tag.strip().removeprefix(b"W/") for tag in known}:
        return False
    request.setResponseCode(304)
    request.finish()
    return True


def send_range_head(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Status and headers of an immutable body of ``size`` bytes (GET and HEAD, ranges too);
    ``etag`` comes with its quotes.

    Gives ``(start, length)`` of what is to follow; None where that is nothing and the request has
    been ended.
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
    """Bytes that a body has beside those of its file, before byte ``at`` of the file."""

    at: int
    content: bytes


def send_file(
    request: Request, path: Path, size: int, etag: str, insertion: Insertion | None = None
) -> None:
    """Serve a finished, immutable file of ``size`` bytes (GET and HEAD, ranges too); ends the
    request.

    ``etag`` comes with its quotes, and is that of the body with its ``insertion``. Raises
    FileNotFoundError, before anything was written, when the file is gone or not whole.
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
    """``left`` bytes of a file from ``at`` on, in pieces at the device's pace; then the request
    ends.
    """

    def __init__(
        self, request: Request, source: BinaryIO, at: int, left: int, insertion: Insertion
    ) -> None:
        self._request, self._source, self._at, self._left = request, source, at, left
        self._insertion = insertion
        self._paused = self._writing = self._over = False
        os.posix_fadvise(source.fileno(), at, left, os.POSIX_FADV_SEQUENTIAL)

    def begin(self) -> None:
        """Registers and starts; the connection may pause or stop us at once."""
        self._request.registerProducer(cast(Any, self), True)
        if not self._paused:
            self.resumeProducing()

    def pauseProducing(self) -> None:
        """The connection has enough for now."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The connection can take more: until it says otherwise, which it may do from within a
        write.
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
            # Somebody cut the file short under our eyes.
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
        """The device is gone."""
        self._over = True
        if not self._writing:
            self._source.close()


def _piece(request: Request) -> int:
    """Bytes for one step: many for few connections, as each step costs; few for a herd."""
    connections: int = getattr(getattr(request, "site", None), "open_connections", 1)
    return _LARGE_PIECE if connections <= FEW else _SMALL_PIECE


async def send_relayed(request: Request, response: ProxiedResponse) -> None:
    """Answer with what another server answered, its body streaming at the device's pace."""
    request.setResponseCode(response.status, phrase_of(response.status))
    for name, values in response.headers.getAllRawHeaders():
        if name.lower() != HEADER:  # the request has its name from us
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
            # Only a cut connection tells the device that this body is not whole.
            abort(request)
        raise
    request.finish()


def abort(request: Request) -> None:
    """Cut the connection: a body that cannot be completed must not look whole."""
    channel = request.channel
    if channel is not None and channel.transport is not None:
        cast(ITCPTransport, channel.transport).abortConnection()
