"""One blob on its way into a sink: hashed as it comes, resumed where it broke off."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

from twisted.web.http_headers import Headers

from obdelta.errors import DigestMismatch, SizeMismatch, TooManyRequests
from obdelta.oci import Descriptor, Digest
from obdelta.registry.http import HttpResponse, PassingTrouble
from obdelta.registry.retry import Tries
from obdelta.registry.upstream import Sink

BATCH = 256 * 1024
"""Bytes that are hashed and written at once: fewer are not worth a thread's turn."""
PATIENCE = 0.2
"""Seconds after which a slow upstream's bytes go on as they are: a device may be reading what the sink has."""
PROGRESS = 1024 * 1024
"""A connection that brought this many bytes before it dropped was not in vain: the count of failures starts anew."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.ASCII)

Fetch = Callable[[Headers], Awaitable[HttpResponse]]
InThread = Callable[..., Awaitable[object]]


class Download:
    """``fetch(headers)`` gives a response of status 200, 206 or 416; ``in_thread(function, *args)`` calls in a thread."""

    def __init__(self, descriptor: Descriptor, sink: Sink, fetch: Fetch, in_thread: InThread) -> None:
        self._size, self._digest = descriptor.size, descriptor.digest
        self._sink, self._fetch, self._in_thread = sink, fetch, in_thread
        # Of exactly the bytes that the sink has, from however many responses they came.
        self._hasher = hashlib.sha256()
        self._received = 0
        self._by_range = True

    async def run(self, tries: Tries) -> None:
        """Until size and digest are proven. Raises as :meth:`obdelta.registry.upstream.Upstream.blob`."""
        while True:
            before = self._received
            try:
                await self._receive()
                break
            except (PassingTrouble, TooManyRequests) as error:
                if self._received and self._received == self._size:
                    break  # All is here; only the end was lost.
                if self._received - before >= PROGRESS:
                    tries.progressed()
                await tries.wait(error)
        actual = Digest(self._hasher.hexdigest())
        if actual != self._digest:
            raise DigestMismatch(self._digest, actual, "blob")

    async def _receive(self) -> None:
        """What is missing, from one response."""
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
                await self._take(batch[skipped:])
            if self._received < self._size:
                if reader.ended_with_connection:
                    raise PassingTrouble(f"{response.host} closed the connection in the middle of a blob")
                raise self._wrong_size(self._received)
        finally:
            response.cancel()

    async def _take(self, batch: bytes) -> None:
        if not batch:
            return
        if self._received + len(batch) > self._size:
            raise self._wrong_size(self._received + len(batch))
        await self._in_thread(self._hasher.update, batch)
        await self._sink.write(batch)
        self._received += len(batch)

    def _bytes_to_skip(self, response: HttpResponse) -> int:
        """How much of this body is in the sink already; raises if the response is not what was asked for."""
        length, status = response.length, response.status
        if status == 200:
            if length is not None and length != self._size:
                raise self._wrong_size(length)
            return self._received
        found = _CONTENT_RANGE.fullmatch(response.header(b"content-range") or "")
        wanted = (self._received, self._size - 1, self._size)
        if status != 206 or found is None or tuple(map(int, found.groups())) != wanted:
            # From here on all is asked for and the part that we have is passed over.
            self._by_range = False
            raise PassingTrouble(f"{response.host} gave another range of a blob than was asked for")
        return 0

    def _wrong_size(self, actual: int) -> SizeMismatch:
        return SizeMismatch(self._size, actual, f"blob {self._digest}")
