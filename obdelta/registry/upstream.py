"""What the rest of obdelta may ask of the upstream, whatever it is: the seam that :mod:`client` and
:mod:`layout` fill.
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
    """Where a blob's bytes go."""

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes, in order (up to about 1 MB); resolves when more may come. Raising
        ends the download.
        """


@dataclass(frozen=True, slots=True)
class ProxiedRequest:
    """One GET or HEAD as a device sent it.

    ``path`` begins with ``/v2/``, is not percent-encoded, and was validated by the face; ``query``
    goes behind ``?`` as it is. ``repository`` is the one that the path names (tokens are fetched
    for it), None for ``/v2/`` itself. Of ``headers`` all but ``Host``, ``Authorization``,
    ``Cookie`` and the hop-by-hop ones go on, each value by itself. ``digest``: what the whole body
    must hash to, where it was requested by digest. It is hashed while it passes, and ``deliver``
    fails before its last bytes where it does not match. A body may then end with the connection,
    too.
    """

    method: bytes
    path: str
    headers: Headers
    credentials: Credentials
    repository: str | None = None
    query: bytes = b""
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class ProxiedResponse:
    """The upstream's answer, its body still on the way.

    ``headers`` has no hop-by-hop ones; ``Content-Length`` is there where the upstream gave a
    length. ``length`` is the body's in bytes, 0 for HEAD and 304, None if unknown.

    ``deliver(consumer)`` streams the body with back-pressure (it registers a push producer, and
    unregisters it at the end; it never calls ``finish``). The Deferred fires with None once the
    whole body has been written, and fails with UpstreamUnavailable if the upstream broke off: what
    was written is then not whole and must not be ended as if it were. It fails with CancelledError
    if the consumer stopped the producer. Cancelling it closes the upstream's connection.

    Whoever got a response must call ``deliver`` or ``cancel``. ``cancel()`` may be called at any
    time, any number of times.
    """

    status: int
    headers: Headers
    length: int | None
    deliver: Callable[[IConsumer], Deferred[None]]
    cancel: Callable[[], None]


class Upstream(Protocol):
    """A registry to pull from. Repositories, tags and digests are validated by the caller
    (:class:`Reference`).

    Everything may raise Unauthorized (with the upstream's challenge), Denied, NameUnknown,
    TooManyRequests and UpstreamUnavailable. What is cancelled closes its connection and leaves
    nothing behind.
    """

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        """By tag or digest (``selector``), its digest verified.

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

        Only when this returns are the bytes in the sink known to match the digest. The declared
        size is a bound with a tolerance. Raises BlobUnknown, what the sink raises, and
        :class:`obdelta.registry.WrongContent`: the caller may start over with an empty sink.
        """

    async def blob_size(
        self, repository: str, digest: Digest, credentials: Credentials, *, patient: bool = True
    ) -> int | None:
        """Returns the size of a blob that the repository has, None where the registry does not tell
        it.

        Nothing is downloaded. ``patient``: with as many attempts as a download has; else those of a
        relayed request. Raises BlobUnknown.
        """

    async def relay(self, request: ProxiedRequest) -> ProxiedResponse:
        """Pass one request on; redirects are followed here. The upstream's error statuses are
        answers, not exceptions, except where the server's own credentials were refused (Denied).
        Raises UpstreamUnavailable before any answer.
        """

    async def close(self) -> None:
        """Close idle connections; nothing may be asked afterwards."""
