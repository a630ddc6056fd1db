"""Sends a range of a file at the pace of the client, and measures how long devices take for layers
of deltas.

Engines apply a layer while they download it, so a device takes bytes as fast as its link and its
processor allow. The first bytes only fill buffers of sockets and proxies. Therefore only the second
half of a body counts: buffers are full by then, and take a byte only after the device took one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.web.http import Request
from zope.interface import implementer

from obdelta.errors import ObdeltaError
from obdelta.net.http_limits import FEW_CONNECTIONS
from obdelta.oci import Digest
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.tables.device_pulls import Download
from obdelta.store.growing_file import GrowingFile
from obdelta.web.delta_form import form_of
from obdelta.web.request import abort

log = Logger()

_LARGE_PIECE, _SMALL_PIECE = 7 << 14, 2 << 14
"""Piece sizes in bytes, whole TLS records: for few connections, and for more. Twisted hands the
first size to the kernel at once (128 KiB with TLS overhead). A slow connection holds one piece,
plus one in OpenSSL's buffer.
"""

MIN_BYTES = 1 << 20
"""Smaller bodies fit into buffers, and are not measured."""
MAX_UNEVEN = 3.0
"""The third and the fourth quarter of a body may differ in time by this factor. Beyond it, buffers
were still being filled, or the device or its link stood still.
"""
MAX_OWN = 0.1
"""The part of the time that the server may have waited for its own disk."""


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


class DownloadPace:
    """Times the second half of a body of ``size`` bytes. ``done`` gets the seconds that the whole
    body would take at this pace; it is not called for a download that says nothing.
    """

    def __init__(self, size: int, clock: IReactorTime, done: Callable[[float], None]) -> None:
        self._size, self._clock, self._done = size, clock, done
        self._begin = self._middle = self._last = (0, 0.0)
        self._own = 0.0

    def wanted(self, sent: int) -> None:
        """Records that the connection wants more than the ``sent`` bytes that it has."""
        self._last = (sent, self._clock.seconds())
        if 2 * sent < self._size:
            self._begin, self._own = self._last, 0.0
        if 4 * sent < 3 * self._size:
            self._middle = self._last

    def read(self) -> None:
        """Counts the time since the last call of :meth:`wanted` as the server's own, not the
        device's.
        """
        self._own += self._clock.seconds() - self._last[1]

    def finished(self) -> None:
        """Reports the download, unless it says nothing."""
        (begin, began), (middle, halved), (end, ended) = self._begin, self._middle, self._last
        if not begin < middle < end:
            return
        third, fourth = (halved - began) / (middle - begin), (ended - halved) / (end - middle)
        seconds = ended - began
        if not 0 < third <= MAX_UNEVEN * fourth or not 0 < fourth <= MAX_UNEVEN * third:
            return
        if self._own <= MAX_OWN * seconds:
            self._done(seconds * self._size / (end - begin))


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
        insertion: Insertion | None,
        pace: DownloadPace | None,
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
        if self._insertion is None:
            return os.pread(self._source.fileno(), most, self._at)
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


class DownloadTimes:
    """Measures downloads of deltas' layers, and records them in the catalogue."""

    def __init__(self, catalogue: Catalogue, clock: IReactorTime, now: Callable[[], float]) -> None:
        """``clock`` is monotonic; ``now`` gives the time of day."""
        self._catalogue, self._clock, self._now = catalogue, clock, now

    def pace(
        self, request: Request, repository: str, digest: Digest, size: int, device: str
    ) -> DownloadPace | None:
        """Returns what follows the download of a delta's blob of ``size`` bytes, None if it would
        tell nothing of the device.

        ``device`` tells devices apart: each has one vote.
        """
        if request.method != b"GET" or size < MIN_BYTES:
            return None
        engine = form_of(request)
        if engine is None:
            return None

        def done(seconds: float) -> None:
            download = Download(repository, digest, device, engine, seconds)
            ensureDeferred(self._record(download))

        return DownloadPace(size, self._clock, done)

    async def _record(self, download: Download) -> None:
        try:
            await self._catalogue.counters.downloaded(download, int(self._now()))
        except ObdeltaError as error:
            log.info("a download's time was not recorded: {reason}", reason=str(error))
        except Exception:
            # No one waits for this, and the device has what it came for.
            log.failure("a download's time was not recorded")
