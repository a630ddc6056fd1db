"""Download of one blob into a sink: hashed as it arrives, resumed after a dropped connection."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

from twisted.web.http_headers import Headers

from obdelta.errors import TooManyRequests
from obdelta.oci import Descriptor
from obdelta.registry.http.retry import Tries
from obdelta.registry.http.transport import HttpResponse, TransientUpstreamError, WrongContent
from obdelta.registry.upstream import Sink

BATCH = 256 * 1024
"""Bytes hashed and written at once: fewer are not worth a thread switch."""
PATIENCE = 0.2
"""Seconds after which a slow upstream's bytes are passed on as they are: a device may be reading
the sink.
"""
PROGRESS = 1024 * 1024
"""A connection that brought this many bytes before it dropped resets the count of failures."""
SIZE_TOLERANCE = 1024 * 1024
"""Bytes by which a blob may always be larger than its descriptor says."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.ASCII)

Fetch = Callable[[Headers], Awaitable[HttpResponse]]
InThread = Callable[..., Awaitable[object]]


def most_bytes(declared: int) -> int:
    """Returns the largest size that is accepted for a blob whose descriptor says ``declared``
    bytes.
    """
    return declared + declared // 8 + SIZE_TOLERANCE


class Download:
    """One blob, into one sink.

    ``fetch(headers)`` returns a response of status 200, 206 or 416. ``in_thread(function, *args)``
    calls in a thread. The digest decides whether the blob is complete. The declared size only
    bounds how much is accepted (:func:`most_bytes`): builders have written manifests with wrong
    sizes, and engines ignore them.
    """

    def __init__(
        self, descriptor: Descriptor, sink: Sink, fetch: Fetch, in_thread: InThread
    ) -> None:
        self._declared, self._digest = descriptor.size, descriptor.digest
        self._sink, self._fetch, self._in_thread = sink, fetch, in_thread
        # Covers exactly the bytes that the sink has, whatever the number of responses.
        self._hasher = hashlib.sha256()
        self._received = 0
        self._by_range = True

    async def run(self, tries: Tries) -> None:
        """Runs until the digest is verified. Raises as
        :meth:`obdelta.registry.upstream.Upstream.blob`.
        """
        while True:
            before = self._received
            try:
                await self._receive()
                return
            except WrongContent:
                raise
            except (TransientUpstreamError, TooManyRequests) as error:
                if self._received > before and self._is_whole():
                    return  # All bytes arrived; only the end of the body was lost.
                if self._received - before >= PROGRESS:
                    tries.progressed()
                await tries.wait(error)

    async def _receive(self) -> None:
        """Takes the missing bytes from one response."""
        headers = Headers()
        if self._received and self._by_range:
            headers.setRawHeaders(b"range", [b"bytes=%d-" % self._received])
        response = await self._fetch(headers)
        try:
            skip = self._bytes_to_skip(response)
            reader = response.reader()
            while batch := await reader.read(BATCH, PATIENCE):
                skipped = min(skip, len(batch))
                skip -= skipped
                await self._take(batch[skipped:], response.host)
        finally:
            response.cancel()
        if self._is_whole():
            return
        if reader.ended_with_connection:
            raise TransientUpstreamError(
                f"{response.host} closed the connection in the middle of a blob"
            )
        if self._received < self._declared:
            raise TransientUpstreamError(f"{response.host} sent fewer bytes of a blob than it has")
        raise WrongContent(f"{response.host} sent other bytes than those of blob {self._digest}")

    def _is_whole(self) -> bool:
        return self._hasher.hexdigest() == self._digest.hex

    async def _take(self, batch: bytes, host: str) -> None:
        if not batch:
            return
        self._check_size(self._received + len(batch), host)
        await self._in_thread(self._hasher.update, batch)
        await self._sink.write(batch)
        self._received += len(batch)

    def _bytes_to_skip(self, response: HttpResponse) -> int:
        """Returns how many bytes of this body are in the sink already. Raises if it is another
        range.
        """
        if response.status == 200:
            if response.length is not None:
                self._check_size(response.length, response.host)
            return self._received
        found = _CONTENT_RANGE.fullmatch(response.header(b"content-range") or "")
        if response.status == 206 and found is not None:
            start, last, total = map(int, found.groups())
            if start == self._received and last == total - 1:
                self._check_size(total, response.host)
                return 0
        # From here on the whole blob is requested, and the bytes already in the sink are skipped.
        self._by_range = False
        raise TransientUpstreamError(
            f"{response.host} sent another range of a blob than was requested"
        )

    def _check_size(self, size: int, host: str) -> None:
        most = most_bytes(self._declared)
        if size > most:
            raise WrongContent(
                f"{host} sends more bytes of blob {self._digest} than the {self._declared} that its"
                " manifest declares"
            )
