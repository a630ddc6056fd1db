"""HTTP responses of the embedded upstream ``oci:DIR`` to a device's registry requests.

Source: OCI distribution specification, "Pull" and "Error Codes".
"""

from __future__ import annotations

import json
import re
from io import BytesIO
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from zope.interface import implementer

from obdelta.concurrency.tasks import Threads
from obdelta.errors import (
    BadDigest,
    BlobUnknown,
    Broken,
    ManifestUnknown,
    Missing,
    NameUnknown,
    UpstreamUnavailable,
)
from obdelta.oci import Digest, Index, Manifest
from obdelta.registry.upstream import ProxiedRequest, ProxiedResponse

_PATH = re.compile(
    r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs|tags)/(?P<reference>[^/]+)", re.ASCII
)
_RANGE = re.compile(rb"bytes=([0-9]{1,18})-([0-9]{0,18})", re.ASCII)
_BATCH = 256 * 1024
_CODES = {
    ManifestUnknown: "MANIFEST_UNKNOWN",
    BlobUnknown: "BLOB_UNKNOWN",
    NameUnknown: "NAME_UNKNOWN",
}


class Source(Protocol):
    """The source of a body's bytes; ``read`` blocks."""

    def read(self, most: int, /) -> bytes: ...
    def close(self) -> None: ...


class Blob(Source, Protocol):
    """An open file."""

    @property
    def size(self) -> int: ...
    def seek(self, offset: int) -> None: ...


class Files(Protocol):
    """The layouts; everything blocks."""

    def tags(self, repository: str) -> list[str]: ...
    def manifest(self, repository: str, selector: str) -> Manifest | Index: ...
    def open_blob(self, repository: str, digest: Digest) -> Blob: ...


class LayoutRelay:
    """Answers GET and HEAD below ``/v2/``."""

    def __init__(self, files: Files, threads: Threads) -> None:
        self._files, self._threads = files, threads

    async def answer(self, request: ProxiedRequest) -> ProxiedResponse:
        """Returns the response; registry errors are responses too. Raises UpstreamUnavailable if
        the layout itself is broken.
        """
        try:
            return await self._answer(request)
        except Missing as error:
            return self._error(request, 404, _CODES[type(error)], str(error))
        except BadDigest as error:
            return self._error(request, 400, "DIGEST_INVALID", str(error))
        except Broken as error:
            raise UpstreamUnavailable(str(error)) from error

    async def _answer(self, request: ProxiedRequest) -> ProxiedResponse:
        if request.path in ("/v2", "/v2/"):
            return self._bytes(
                request, 200, b"{}", Headers({b"content-type": [b"application/json"]})
            )
        match = _PATH.fullmatch(request.path)
        if match is None:
            return self._error(request, 404, "UNSUPPORTED", "there is nothing at this path")
        repository, kind, reference = match["repository"], match["kind"], match["reference"]
        if kind == "manifests":
            return await self._manifest(request, repository, reference)
        if kind == "blobs":
            return await self._blob(request, repository, Digest.parse(reference))
        tags = await self._threads.run(self._files.tags, repository)
        body = json.dumps({"name": repository, "tags": tags}).encode("ascii")
        return self._bytes(request, 200, body, Headers({b"content-type": [b"application/json"]}))

    async def _manifest(
        self, request: ProxiedRequest, repository: str, reference: str
    ) -> ProxiedResponse:
        manifest = await self._threads.run(self._files.manifest, repository, reference)
        headers = _content_headers(manifest.digest, manifest.media_type)
        if _has_it(request, manifest.digest):
            return self._bytes(request, 304, b"", headers)
        return self._bytes(request, 200, manifest.raw, headers)

    async def _blob(
        self, request: ProxiedRequest, repository: str, digest: Digest
    ) -> ProxiedResponse:
        opened = await self._threads.run(self._files.open_blob, repository, digest)
        size = opened.size
        headers = _content_headers(digest, "application/octet-stream")
        headers.setRawHeaders(b"accept-ranges", [b"bytes"])
        if _has_it(request, digest):
            opened.close()
            return self._bytes(request, 304, b"", headers)
        start, end = 0, size - 1
        requested = _RANGE.fullmatch((request.headers.getRawHeaders(b"range") or [b""])[0].strip())
        status = 200
        # Anything but a single range with a start is ignored, which RFC 9110, 14.2, allows.
        if requested is not None and _range_applies(request, digest):
            first, last = int(requested[1]), int(requested[2] or size)
            if first >= size:
                opened.close()
                headers.setRawHeaders(b"content-range", [b"bytes */%d" % size])
                return self._bytes(request, 416, b"", headers)
            if first <= last:
                status, start, end = 206, first, min(last, size - 1)
                headers.setRawHeaders(b"content-range", [b"bytes %d-%d/%d" % (start, end, size)])
        opened.seek(start)
        return self._respond(request, status, opened, end - start + 1, headers)

    def _bytes(
        self, request: ProxiedRequest, status: int, body: bytes, headers: Headers
    ) -> ProxiedResponse:
        return self._respond(request, status, BytesIO(body), len(body), headers)

    def _error(
        self, request: ProxiedRequest, status: int, code: str, message: str
    ) -> ProxiedResponse:
        body = (
            json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode(
                "ascii"
            )
            + b"\n"
        )
        return self._bytes(request, status, body, Headers({b"content-type": [b"application/json"]}))

    def _respond(
        self, request: ProxiedRequest, status: int, body: Source, length: int, headers: Headers
    ) -> ProxiedResponse:
        headers.setRawHeaders(b"docker-distribution-api-version", [b"registry/2.0"])
        if status != 304:
            headers.setRawHeaders(b"content-length", [b"%d" % length])
        if request.method == b"HEAD":
            length = 0
        delivery = FileDelivery(body, length, self._threads)
        return ProxiedResponse(status, headers, length, delivery.start, delivery.cancel)


def _content_headers(digest: Digest, media_type: str) -> Headers:
    return Headers(
        {
            b"content-type": [media_type.encode("ascii")],
            b"docker-content-digest": [str(digest).encode("ascii")],
            b"etag": [f'"{digest}"'.encode("ascii")],
        }
    )


def _has_it(request: ProxiedRequest, digest: Digest) -> bool:
    known = [
        tag.strip()
        for header in request.headers.getRawHeaders(b"if-none-match") or []
        for tag in header.split(b",")
    ]
    return f'"{digest}"'.encode("ascii") in known


def _range_applies(request: ProxiedRequest, digest: Digest) -> bool:
    condition = request.headers.getRawHeaders(b"if-range")
    return condition is None or condition[0].strip() == f'"{digest}"'.encode("ascii")


@implementer(IPushProducer)
class FileDelivery:
    """``length`` bytes of a file from its current offset, read in threads at the consumer's pace.
    Closes the file.
    """

    def __init__(self, source: Source, length: int, threads: Threads) -> None:
        self._source, self._left, self._threads = source, length, threads
        self._consumer: IConsumer | None = None
        self._done: Deferred[None] = Deferred(lambda _: self.cancel())
        self._paused = self._reading = False

    def start(self, consumer: IConsumer) -> Deferred[None]:
        """Streams; see :class:`obdelta.registry.upstream.ProxiedResponse`."""
        self._consumer = consumer
        consumer.registerProducer(self, True)
        self._read()
        return self._done

    def _read(self) -> None:
        if self._consumer is None or self._paused or self._reading:
            return
        if self._left:
            self._reading = True
            batch = ensureDeferred(self._threads.run(self._source.read, min(_BATCH, self._left)))
            batch.addCallbacks(self._pass_on, self._fail)
        else:
            self._end().callback(None)

    def _pass_on(self, batch: bytes) -> None:
        self._reading = False
        if self._consumer is None:
            return
        if batch:
            self._left -= len(batch)
            self._consumer.write(batch)
            self._read()
        else:
            self._end().errback(UpstreamUnavailable("a blob of the layout has become shorter"))

    def _fail(self, failure: Failure) -> None:
        if self._consumer is not None:
            self._end().errback(failure)

    def _end(self) -> Deferred[None]:
        consumer, self._consumer = self._consumer, None
        self._source.close()
        if consumer is not None:
            consumer.unregisterProducer()
        return self._done

    def pauseProducing(self) -> None:
        """Pauses the delivery."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Resumes the delivery."""
        self._paused = False
        self._read()

    def stopProducing(self) -> None:
        """Ends the delivery. May be called more than once."""
        self.cancel()

    def cancel(self) -> None:
        """Stops, and closes the file. May be called at any time."""
        if self._consumer is None:
            self._source.close()
        else:
            self._end().errback(CancelledError())
