"""Proxied requests and responses: which headers pass, and bodies that are hashed on the way.

The last bytes of a hashed body are sent only after its digest is verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from zope.interface import implementer

from obdelta.concurrency.tasks import Waiters
from obdelta.oci import Digest
from obdelta.registry.http.bodies import BodyReader
from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.http.transport_errors import WrongContent
from obdelta.registry.upstream import ProxiedResponse

BATCH = 256 * 1024
"""Bytes hashed at once, in a thread. One batch is held back until the next has arrived."""
FLUSH_SECONDS = 0.2
"""Seconds after which fewer bytes are hashed and passed on."""

InThread = Callable[..., Awaitable[object]]

# RFC 9110, 7.6.1, and those of older HTTP.
_HOP_BY_HOP = (
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
)
_NOT_FORWARDED = (*_HOP_BY_HOP, b"host", b"authorization", b"cookie", b"content-length", b"expect")
# These concern the upstream's own origin, which the device does not talk to.
_NOT_RETURNED = (*_HOP_BY_HOP, b"set-cookie", b"alt-svc", b"strict-transport-security")


def relay_headers(headers: Headers) -> Headers:
    """Returns a device's headers for the upstream. Several values of one name stay separate."""
    return _without(headers, _NOT_FORWARDED)


def relayed(
    method: bytes, response: HttpResponse, verified: VerifiedDelivery | None = None
) -> ProxiedResponse:
    """Returns the upstream's response to a ``method`` for the device. ``verified`` delivers the
    body if it is hashed.
    """
    headers = _without(response.headers, _NOT_RETURNED)
    # Twisted keeps a body's length apart from the headers, except in response to HEAD.
    if response.length is not None and method != b"HEAD" and response.status not in (204, 304):
        headers.setRawHeaders(b"content-length", [b"%d" % response.length])
    deliver = response.deliver if verified is None else verified.start
    return ProxiedResponse(response.status, headers, response.length, deliver, response.cancel)


def relayed_bytes(response: HttpResponse, content: bytes) -> ProxiedResponse:
    """Returns the upstream's response for the device, with a body that was read already."""
    headers = _without(response.headers, _NOT_RETURNED)
    headers.setRawHeaders(b"content-length", [b"%d" % len(content)])

    def deliver(consumer: IConsumer) -> Deferred[None]:
        consumer.write(content)
        return succeed(None)

    return ProxiedResponse(response.status, headers, len(content), deliver, lambda: None)


def _without(headers: Headers, names: tuple[bytes, ...]) -> Headers:
    kept = headers.copy()
    named = [
        name
        for value in headers.getRawHeaders(b"connection") or []
        for name in value.lower().split(b",")
    ]
    for name in (*names, *(name.strip() for name in named)):
        kept.removeHeader(name)
    return kept


@implementer(IPushProducer)
class VerifiedDelivery:
    """The body of a response, for one consumer; see
    :attr:`obdelta.registry.upstream.ProxiedResponse.deliver`.

    The last bytes are not written if the body does not match ``digest``: the Deferred fails with
    WrongContent, and the caller cuts the connection. A body may end with the connection, since the
    digest shows whether it is complete.
    """

    def __init__(self, response: HttpResponse, digest: Digest, in_thread: InThread) -> None:
        self._response, self._digest, self._in_thread = response, digest, in_thread
        self._hasher = hashlib.sha256()
        self._resumed: Waiters[None] = Waiters()
        self._paused = self._stopped = False

    def start(self, consumer: IConsumer) -> Deferred[None]:
        """Streams the body. The Deferred fires once, at its end or with the failure."""
        done: Deferred[None] = Deferred(lambda _: self.stopProducing())

        def ended(outcome: Failure | None) -> None:
            consumer.unregisterProducer()
            if not done.called:
                done.callback(outcome)

        consumer.registerProducer(self, True)
        ensureDeferred(self._run(consumer)).addBoth(ended)
        return done

    async def _run(self, consumer: IConsumer) -> None:
        reader = self._response.reader()
        try:
            held = b""
            while batch := await self._read(reader):
                await self._in_thread(self._hasher.update, batch)
                await self._write(consumer, held)
                held = batch
            if self._hasher.hexdigest() != self._digest.hex:
                raise WrongContent(
                    f"{self._response.host} sent other bytes than those of {self._digest}"
                )
            await self._write(consumer, held)
        finally:
            self._response.cancel()

    async def _read(self, reader: BodyReader) -> bytes:
        try:
            return await reader.read(BATCH, FLUSH_SECONDS)
        except Exception:
            if self._stopped:
                raise CancelledError from None
            raise

    async def _write(self, consumer: IConsumer, chunk: bytes) -> None:
        if self._paused and not self._stopped:
            await self._resumed.wait()
        if self._stopped:
            raise CancelledError
        if chunk:
            consumer.write(chunk)

    def pauseProducing(self) -> None:
        """Pauses the delivery."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Resumes the delivery."""
        self._paused = False
        self._resumed.fire(None)

    def stopProducing(self) -> None:
        """Ends the delivery. May be called more than once."""
        self._stopped = True
        self._response.cancel()
        self._resumed.fire(None)
