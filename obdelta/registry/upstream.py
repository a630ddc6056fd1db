"""The upstream's interface: manifests, blobs and proxied requests, whichever implementation serves
them.

Implemented by :mod:`obdelta.registry.client` and :mod:`obdelta.registry.layouts.oci_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer
from twisted.web.http_headers import Headers

from obdelta.oci import Descriptor, Digest, ImageConfig, Index, Manifest
from obdelta.registry.auth.credentials import Credentials


class Sink(Protocol):
    """The destination of a blob's bytes."""

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes, in order (up to about 1 MB); resolves when more may come. An
        exception ends the download.
        """


@dataclass(frozen=True, slots=True)
class ProxiedRequest:
    """One GET or HEAD from a device.

    ``path`` begins with ``/v2/``, is not percent-encoded, and was validated by the device endpoint.
    ``query`` follows ``?`` unchanged. ``repository`` is the one in the path (tokens are fetched for
    it), None for ``/v2/`` itself. All ``headers`` are passed on, each value by itself, except
    ``Host``, ``Authorization``, ``Cookie`` and hop-by-hop ones. ``digest``: the expected digest of
    the whole body, if requested by digest. The body is hashed as it passes, and ``deliver`` fails
    before its last bytes if it does not match. Such a body may also end with the connection.
    ``impatient``: a failure is retried once, because the sender repeats the request by itself.
    """

    method: bytes
    path: str
    headers: Headers
    credentials: Credentials
    repository: str | None = None
    query: bytes = b""
    digest: Digest | None = None
    impatient: bool = False


@dataclass(frozen=True, slots=True)
class ProxiedResponse:
    """The upstream's response, with its body not yet received.

    ``headers`` has no hop-by-hop ones; ``Content-Length`` is there if the upstream gave a length.
    ``length`` is the body's in bytes, 0 for HEAD and 304, None if unknown.

    ``deliver(consumer)`` streams the body with back-pressure. It registers a push producer and
    unregisters it at the end; it never calls ``finish``. The Deferred fires with None once the
    whole body was written. It fails with UpstreamUnavailable if the upstream broke off: the written
    bytes are then incomplete and must not be ended as if they were whole. It fails with
    CancelledError if the consumer stopped the producer. Cancelling it closes the upstream's
    connection.

    The caller must call ``deliver`` or ``cancel``. ``cancel()`` may be called at any time, any
    number of times.
    """

    status: int
    headers: Headers
    length: int | None
    deliver: Callable[[IConsumer], Deferred[None]]
    cancel: Callable[[], None]


class Upstream(Protocol):
    """A registry to pull from. The caller validates repositories, tags and digests
    (:class:`Reference`).

    Everything may raise Unauthorized (with the upstream's challenge), Denied, NameUnknown,
    TooManyRequests and UpstreamUnavailable. Cancelling closes the connection and leaves nothing
    behind.
    """

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        """Returns a manifest by tag or digest (``selector``), its digest verified.

        Raises ManifestUnknown, ManifestInvalid.
        """

    async def small_blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int
    ) -> bytes:
        """Returns a whole small blob (an image config), its digest verified.

        Raises BlobUnknown; ManifestInvalid if it is declared larger than ``limit`` bytes.
        """

    async def config(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> ImageConfig:
        """Returns an image config, verified and parsed. Raises BlobUnknown, ManifestInvalid."""

    async def blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink
    ) -> None:
        """Streams a blob into ``sink``; dropped connections are resumed.

        The bytes in the sink are known to match the digest only when this returns. The declared
        size is a bound with a tolerance. Raises BlobUnknown, what the sink raises, and
        :class:`obdelta.registry.WrongContent`: the caller may start over with an empty sink.
        """

    async def blob_size(
        self, repository: str, digest: Digest, credentials: Credentials, *, patient: bool = True
    ) -> int | None:
        """Returns the size of a blob that the repository has, or None if the registry does not
        report it.

        Nothing is downloaded. ``patient``: with as many attempts as a download; else those of a
        proxied request. Raises BlobUnknown.
        """

    async def relay(self, request: ProxiedRequest) -> ProxiedResponse:
        """Passes one request on, and follows redirects. Returns the upstream's error statuses as
        responses.

        Raises Denied if the server's own credentials were refused, and UpstreamUnavailable before
        any response.
        """

    async def close(self) -> None:
        """Closes idle connections; no request may follow."""
