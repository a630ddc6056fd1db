"""Sends files while they are still being written: chunked, or padded to an announced length."""

from __future__ import annotations

from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer
from twisted.web.http import Request
from zope.interface import implementer

from obdelta.errors import BatchInvalid, BlobUnknown
from obdelta.rsync.no_op_padding import Filling
from obdelta.store.file_writer import ExternalFile
from obdelta.store.growing_file import CHUNK, GrowingFile
from obdelta.web.bodies import (
    RangeNotSatisfiable,
    abort,
    parse_range,
    send_range_head,
    single_range,
    wanted_range,
)

NO_CHUNKS = b"x-obdelta-no-chunks"
"""A request header between processes of one server: the device itself spoke HTTP/1.0."""


class LengthExceeded(BlobUnknown):
    """A batch that became longer than announced. Its URL is invalid from then on, and the client
    must retry.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        super().__init__(f"of {length} bytes, as was announced: it has {size}")


async def follow(request: Request, file: ExternalFile) -> bool:
    """Sends a file that is still being written. Returns False, with nothing sent, once it is
    finished and its length is known.
    """
    # There is no ETag yet, so no If-Range can match: the client gets the whole body.
    part = single_range(request) is not None and request.getHeader(b"if-range") is None
    wanted = _bounded_range(request) if part else None
    whole = request.method == b"GET" and not part and _takes_chunks(request)
    if not whole and wanted is None:
        # Without chunks, or for "from here to the end", the length is needed: wait for it.
        await file.done()
        return False
    start, stop = 0, None
    if wanted is not None:
        start, stop = wanted
        await file.reached(stop - 1)
        if file.complete:
            return False
        request.setResponseCode(206)
        request.setHeader(b"content-range", f"bytes {start}-{stop - 1}/*".encode("ascii"))
        request.setHeader(b"content-length", str(stop - start).encode("ascii"))
    request.setHeader(b"content-type", b"application/octet-stream")
    request.setHeader(b"accept-ranges", b"bytes")
    try:
        await file.deliver(request, start, stop)
    except BaseException:
        # Bytes have been sent: only a cut connection shows that they are incomplete.
        abort(request)
        raise
    request.finish()
    return True


async def send_known(request: Request, file: GrowingFile, size: int, etag: str) -> None:
    """Sends a file of known length and digest while it is written (ranges too), and ends the
    request.

    A failure before the first body byte is raised with nothing sent. Later failures cut the
    connection.
    """
    try:
        wanted = wanted_range(request, size, etag)
    except RangeNotSatisfiable:
        wanted = (0, 0)
    await file.reached(wanted[0] if wanted is not None else 0)
    wanted = send_range_head(request, size, etag)
    if wanted is None:
        return
    try:
        await file.deliver(request, wanted[0], wanted[0] + wanted[1])
    except BaseException:
        abort(request)
        raise
    request.finish()


async def send_filled(request: Request, file: ExternalFile, length: int, etag: str) -> int:
    """Sends a batch, finished or growing, as a body of ``length`` bytes (GET and HEAD, ranges too),
    and ends the request.

    Returns the number of padding bytes sent. Raises LengthExceeded if the batch is longer. If bytes
    have been sent by then, the connection is cut.
    """
    if file.complete:
        _filling(file, length)
    request.setHeader(b"content-type", b"application/octet-stream")
    wanted = send_range_head(request, length, etag)
    if wanted is None:
        return 0
    start, stop = wanted[0], wanted[0] + wanted[1]
    # The headers are sent at once, though the first byte may have to wait: a client that asked
    # for a range should see that it is coming.
    request.write(b"")
    # The file may be removed once it is complete, if the batch turned out too large.
    kept = file.use()
    try:
        sent = await _deliver_filled(request, file, length, start, stop)
    except BaseException:
        abort(request)
        raise
    finally:
        kept.release()
    request.finish()
    return sent


async def _deliver_filled(
    request: Request, file: ExternalFile, length: int, start: int, stop: int
) -> int:
    position = start
    while not file.complete and position < stop:
        await file.reached(position)
        if file.size > length:
            raise LengthExceeded(length, file.size)
        if not file.complete:
            until = min(file.available, stop)
            await file.deliver(request, position, until)
            position = until
    if position >= stop:
        return 0
    filling = _filling(file, length)
    body = file.size - file.tail
    if position < min(body, stop):
        await file.deliver(request, position, min(body, stop))
        position = min(body, stop)
    first, last = position - body, min(stop - body, filling.length)
    if filling.length and first < last:
        await _Fill(request, filling, first, last).done
        position = body + last
    if position < stop:
        await file.deliver(request, position - filling.length, stop - filling.length)
    return max(0, last - max(0, first)) if filling.length else 0


def _filling(file: ExternalFile, length: int) -> Filling:
    try:
        return Filling(length - file.size)
    except BatchInvalid as error:
        raise LengthExceeded(length, file.size) from error


@implementer(IPullProducer)
class _Fill:
    """Writes bytes ``at`` to ``stop`` of the padding. ``done`` fires after the last one; cancelling
    it stops the writing.
    """

    def __init__(self, request: Request, filling: Filling, at: int, stop: int) -> None:
        self.done: Deferred[None] = Deferred(lambda _: self._end())
        self._request, self._filling, self._at, self._stop = request, filling, at, stop
        self._over = False
        request.registerProducer(cast(IPullProducer, self), False)

    def resumeProducing(self) -> None:
        """Writes one more piece."""
        if self._over:
            return
        piece = self._filling.read(self._at, min(CHUNK, self._stop - self._at))
        self._at += len(piece)
        self._request.write(piece)
        if self._at >= self._stop and not self._over:
            self._end()
            self.done.callback(None)

    def stopProducing(self) -> None:
        """Stops, as the client is gone. The request cancels the coroutine that waits for
        ``done``.
        """
        self._over = True

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._request.unregisterProducer()


def _takes_chunks(request: Request) -> bool:
    return request.clientproto == b"HTTP/1.1" and not request.requestHeaders.hasHeader(NO_CHUNKS)


def _bounded_range(request: Request) -> tuple[int, int] | None:
    """Returns ``bytes=a-b`` of a GET as ``(a, b + 1)``, or None for anything else."""
    header = single_range(request)
    if (
        header is None
        or request.method != b"GET"
        or header.rstrip().endswith(b"-")
        or b"=-" in header
    ):
        return None
    try:
        found = parse_range(header, 1 << 60)
    except RangeNotSatisfiable:
        return None
    return None if found is None else (found[0], found[0] + found[1])
