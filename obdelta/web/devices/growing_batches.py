"""Sends v2 batches whose length is not known: chunked while they are written, or padded to an
announced length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer
from twisted.web.http import Request
from zope.interface import implementer

from obdelta.errors import BatchInvalid, BlobUnknown
from obdelta.rsync.no_op_padding import Padding
from obdelta.store.file_writer import ExternalFile
from obdelta.store.growing_file import CHUNK
from obdelta.web.devices.byte_ranges import bounded_range, single_range
from obdelta.web.devices.responses import ends_whole, send_range_head

NO_CHUNKS = b"x-obdelta-no-chunks"
"""A request header between processes of one server: the device itself uses HTTP/1.0."""


class LengthExceeded(BlobUnknown):
    """A batch that became longer than announced. Its URL is invalid from then on, and the client
    must retry.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        super().__init__(f"of {length} bytes, as was announced: it has {size}")


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch, complete or growing, that is sent as a body of ``length`` bytes."""

    file: ExternalFile
    length: int
    etag: str


async def send_chunked(request: Request, file: ExternalFile) -> bool:
    """Sends a file that is still being written. Returns False, with nothing sent, once it is
    complete and its length is known.
    """
    # There is no ETag yet, so no If-Range can match: the client gets the whole body.
    part = single_range(request) is not None and request.getHeader(b"if-range") is None
    wanted = bounded_range(request) if part else None
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
    with ends_whole(request):
        await file.deliver(request, start, stop)
    return True


async def send_padded(request: Request, body: Padded) -> int:
    """Sends a batch as a body of the announced length (GET and HEAD, ranges too), and ends the
    request.

    Returns the number of padding bytes sent. Raises LengthExceeded if the batch is longer. If bytes
    have been sent by then, the connection is cut.
    """
    file, length = body.file, body.length
    if file.complete:
        _padding(file, length)
    request.setHeader(b"content-type", b"application/octet-stream")
    wanted = send_range_head(request, length, body.etag)
    if wanted is None:
        return 0
    start, stop = wanted[0], wanted[0] + wanted[1]
    # The headers are sent at once, though the first byte may have to wait: a client that asked
    # for a range should see that it is coming.
    request.write(b"")
    # The file may be removed once it is complete, if the batch turned out too large.
    kept = file.use()
    try:
        with ends_whole(request):
            return await _deliver_padded(request, file, length, start, stop)
    finally:
        kept.release()


async def _deliver_padded(
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
    padding = _padding(file, length)
    body = file.size - file.tail
    if position < min(body, stop):
        await file.deliver(request, position, min(body, stop))
        position = min(body, stop)
    first, last = position - body, min(stop - body, padding.length)
    if padding.length and first < last:
        await _PaddingProducer(request, padding, first, last).done
        position = body + last
    if position < stop:
        await file.deliver(request, position - padding.length, stop - padding.length)
    return max(0, last - max(0, first)) if padding.length else 0


def _padding(file: ExternalFile, length: int) -> Padding:
    try:
        return Padding(length - file.size)
    except BatchInvalid as error:
        raise LengthExceeded(length, file.size) from error


@implementer(IPullProducer)
class _PaddingProducer:
    """Writes bytes ``at`` to ``stop`` of the padding. ``done`` fires after the last one; cancelling
    it stops the writing.
    """

    def __init__(self, request: Request, padding: Padding, at: int, stop: int) -> None:
        self.done: Deferred[None] = Deferred(lambda _: self._end())
        self._request, self._padding, self._at, self._stop = request, padding, at, stop
        self._over = False
        request.registerProducer(cast(IPullProducer, self), False)

    def resumeProducing(self) -> None:
        """Writes one more piece."""
        if self._over:
            return
        piece = self._padding.read(self._at, min(CHUNK, self._stop - self._at))
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
