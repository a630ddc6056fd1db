"""Blobs of a registry: their sizes, and downloads that are hashed as they arrive and resumed after
a dropped connection.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable

from twisted.web.http_headers import Headers

from obdelta.errors import BlobUnknown, TooManyRequests
from obdelta.oci import Descriptor, Digest
from obdelta.registry.auth.credentials import Credentials
from obdelta.registry.http.redirects import Answer
from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.http.transport_errors import TransientUpstreamError, WrongContent
from obdelta.registry.requests import Retrier, Session, error_of
from obdelta.registry.upstream import Sink

BATCH = 256 * 1024
"""Bytes hashed and written at once. With fewer, switching threads costs more than the work."""
FLUSH_SECONDS = 0.2
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


def max_bytes(declared: int) -> int:
    """Returns the largest size that is accepted for a blob whose descriptor says ``declared``
    bytes.
    """
    return declared + declared // 8 + SIZE_TOLERANCE


class Download:
    """One blob, into one sink.

    ``fetch(headers)`` returns a response of status 200, 206 or 416. ``in_thread(function, *args)``
    calls in a thread. The digest decides whether the blob is complete. The declared size only
    bounds how much is accepted (:func:`max_bytes`): builders have written manifests with wrong
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

    async def run(self, retrier: Retrier) -> None:
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
                    retrier.progressed()
                await retrier.wait(error)

    async def _receive(self) -> None:
        """Takes the missing bytes from one response."""
        headers = Headers()
        if self._received and self._by_range:
            headers.setRawHeaders(b"range", [b"bytes=%d-" % self._received])
        response = await self._fetch(headers)
        try:
            skip = self._bytes_to_skip(response)
            reader = response.reader()
            while batch := await reader.read(BATCH, FLUSH_SECONDS):
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
        most = max_bytes(self._declared)
        if size > most:
            raise WrongContent(
                f"{host} sends more bytes of blob {self._digest} than the {self._declared} that its"
                " manifest declares"
            )


_MAX_SIZE_DIGITS = 18
"""Maximum number of digits of a size."""


async def blob_size(
    session: Session,
    repository: str,
    digest: Digest,
    credentials: Credentials,
    retrier: Retrier,
    *,
    scope: str | None = None,
) -> int | None:
    """Returns the size of a blob that the repository has, or None if the registry does not report
    it. Downloads nothing.

    Many registries and proxies refuse HEAD on blobs, or redirect it to storage whose URL is signed
    for GET alone. Their response then says nothing about the blob, so a GET follows whose body is
    not read.

    ``scope`` as for :meth:`Session.send`. Raises BlobUnknown, and what a download raises.
    """
    path = f"/v2/{repository}/blobs/{digest}"
    method = b"HEAD"

    async def probe() -> int | None:
        nonlocal method
        answer = await session.send(method, path, Headers(), credentials, repository, scope=scope)
        if method == b"HEAD" and get_may_succeed(answer):
            await answer.response.discard()
            method = b"GET"
            answer = await session.send(
                method, path, Headers(), credentials, repository, scope=scope
            )
        if answer.response.status != 200:
            method = b"GET"
            raise await error_of(answer, repository, BlobUnknown(digest))
        size = announced_size(answer.response)
        answer.response.cancel()
        return size

    return await retrier.call(probe)


def get_may_succeed(answer: Answer) -> bool:
    """Returns whether a GET may succeed although this HEAD of a blob failed.

    Final are success, the registry's own 401, 403 and 404, and rate limits, which are waited for.
    """
    status = answer.response.status
    if 200 <= status < 300 or status in (304, 412, 416, 429):
        return False
    return answer.foreign or status not in (401, 403, 404, 410)


def announced_size(response: HttpResponse) -> int | None:
    """Returns the size of the body that a response announces, also in response to HEAD.

    Zero counts as unknown: some registries answer every HEAD so.
    """
    length = response.header(b"content-length") or ""
    if length.isascii() and length.isdigit() and len(length) <= _MAX_SIZE_DIGITS:
        return int(length) or None
    return response.length or None
