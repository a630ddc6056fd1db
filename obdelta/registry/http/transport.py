"""The only HTTP client for the upstream: treq, with bodies exactly as received.

treq always requests gzip and undoes it, keeps cookies, follows redirects and buffers. Here all four
are off. Blobs are hashed and resumed by the byte, and cookies of one device must not reach the
next. :mod:`obdelta.registry.http.redirects` decides which origins get credentials. Every wait is
bounded: ``idle`` seconds without data count as a dropped connection.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urlsplit

from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IReactorTime
from twisted.web.client import HTTPConnectionPool
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from obdelta.errors import UpstreamUnavailable
from obdelta.observability import Metrics
from obdelta.observability.logging import REQUEST_ID_HEADER, current_request
from obdelta.registry.http.bodies import BodyDelivery, BodyReader
from obdelta.registry.http.request_bodies import Body
from obdelta.registry.http.transport_errors import (
    TRANSPORT_ERRORS,
    TransientUpstreamError,
    translated,
)

_HIDDEN = b"x-obdelta-content-encoding"
_URL = b"x-obdelta-url"
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


@implementer(IAgent)
class _Verbatim:
    """Keeps treq from requesting and undoing gzip, and from rewriting the URL.

    treq does not support IPv6 addresses, and escapes characters that a redirect's signature may
    cover. The actual URL is in a header of our own.
    """

    def __init__(self, agent: IAgent) -> None:
        self._agent = agent

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """Sends only the first Accept-Encoding; treq's own comes after it."""
        sent = Headers() if headers is None else headers.copy()
        (uri,) = sent.getRawHeaders(_URL, [uri])
        sent.removeHeader(_URL)
        sent.setRawHeaders(
            b"accept-encoding", (sent.getRawHeaders(b"accept-encoding") or [b"identity"])[:1]
        )
        return self._agent.request(method, uri, sent, bodyProducer).addCallback(_hide_encoding)


def _hide_encoding(response: IResponse) -> IResponse:
    _move(response.headers, b"content-encoding", _HIDDEN)
    return response


def _move(headers: Headers, old: bytes, new: bytes) -> None:
    values = headers.getRawHeaders(old)
    headers.removeHeader(old)
    headers.removeHeader(new)
    if values:
        headers.setRawHeaders(new, values)


class HttpResponse:
    """A status, headers, and an unread body. Call one of the methods, once; ``cancel`` at any time.

    ``length`` is the body's in bytes, None if unknown. ``url`` is the requested one (it may be
    signed: never log it).
    """

    def __init__(
        self,
        url: str,
        response: IResponse,
        clock: IReactorTime,
        idle: float,
        metrics: Metrics | None = None,
    ) -> None:
        self.url = url
        self.status: int = response.code
        self.headers: Headers = response.headers
        self.length: int | None = (
            None if response.length is UNKNOWN_LENGTH else int(response.length)
        )
        self._response, self._clock, self._idle, self._metrics = (
            response,
            clock,
            idle,
            metrics or Metrics(),
        )
        self._body: BodyReader | BodyDelivery | None = None

    @property
    def host(self) -> str:
        """Returns the host, safe for messages."""
        return urlsplit(self.url).netloc

    def header(self, name: bytes) -> str | None:
        """Returns the first value, as text."""
        values = self.headers.getRawHeaders(name)
        return values[0].decode("latin-1").strip() if values else None

    def date(self) -> datetime | None:
        """Returns the response's ``Date``: times in it are compared with this, not with our own
        clock.
        """
        return _http_date(self.header(b"date"))

    def retry_after(self) -> float | None:
        """Returns the seconds that ``Retry-After`` requests (RFC 9110), None if it is missing or
        invalid.
        """
        value = self.header(b"retry-after")
        if value is None:
            return None
        if _SECONDS.fullmatch(value):
            return float(value)
        now, then = self.date(), _http_date(value)
        return max(0.0, (then - now).total_seconds()) if now and then else None

    def reader(self) -> BodyReader:
        """Returns a reader of the body at the caller's pace; the caller closes it."""
        reader = BodyReader(self._clock, self._idle, self._cut)
        self._body = reader
        reader.attach(self._response)
        return reader

    def deliver(self, consumer: IConsumer) -> Deferred[None]:
        """Streams the body: see :class:`obdelta.registry.upstream.ProxiedResponse`."""
        # An error page of an old proxy may end with its connection; a possible blob must announce
        # its end.
        delivery = BodyDelivery(
            consumer, self._clock, self._idle, self._cut, may_end_with_connection=self.status >= 400
        )
        self._body = delivery
        return delivery.start(self._response)

    def cancel(self) -> None:
        """Closes the connection unless the body is complete."""
        if self._body is None:
            self.reader()
        if self._body is not None:
            self._body.cancel()

    async def content(self, limit: int) -> bytes | None:
        """Returns the whole body; None, and a closed connection, if it has more than ``limit``
        bytes.
        """
        if self.length is not None and self.length > limit:
            self.cancel()
            return None
        reader = self.reader()
        try:
            content = bytearray()
            while chunk := await reader.read():
                content += chunk
                if len(content) > limit:
                    return None
            return bytes(content)
        finally:
            reader.cancel()

    async def discard(self) -> None:
        """Reads a small body to its end, so that the connection can be reused; closes it
        otherwise.
        """
        with suppress(
            TransientUpstreamError
        ):  # The body was not needed, so its failure does not matter.
            await self.content(8192)

    def _cut(self, why: str) -> TransientUpstreamError:
        self._metrics.upstream_failed("body")
        return TransientUpstreamError(f"{self.host} {why}")


class Http:
    """Sends requests. :meth:`close` closes ``pool``; the agent should use it."""

    def __init__(
        self,
        agent: IAgent,
        clock: IReactorTime,
        *,
        idle: float = 60.0,
        pool: HTTPConnectionPool | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        # No domain is allowed, so that no cookie is ever kept.
        cookies = IndexableCookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._treq = HTTPClient(_Verbatim(agent), cookiejar=cookies)
        self._clock, self._idle, self._pool = clock, idle, pool

    async def request(
        self, method: bytes, url: str, headers: Headers, body: Body | None = None
    ) -> HttpResponse:
        """Sends a request and waits for the response's headers. ``Accept-Encoding`` is ``identity``
        unless ``headers`` set it.

        Raises TransientUpstreamError if a retry may help, else UpstreamUnavailable. Cancelling
        closes the connection.
        """
        sent = headers.copy()
        if not sent.hasHeader(b"accept-encoding"):
            sent.setRawHeaders(b"accept-encoding", [b"identity"])
        if name := current_request():
            sent.setRawHeaders(REQUEST_ID_HEADER, [name.encode("ascii")])
        sent.setRawHeaders(_URL, [url.encode("ascii")])
        host = urlsplit(url).netloc
        answer = self._treq.request(
            method.decode("ascii"),
            "http://upstream/",
            headers=sent,
            data=body,
            allow_redirects=False,
            unbuffered=True,
        )
        late = False

        def on_timeout() -> None:
            nonlocal late
            late = True
            answer.cancel()

        timer = self._clock.callLater(self._idle, on_timeout)
        if body is not None:
            body.progressed = lambda: timer.reset(self._idle) if timer.active() else None
        try:
            response = await answer
        except TRANSPORT_ERRORS as error:
            if late:
                self._metrics.upstream_failed("timeout")
                raise TransientUpstreamError(
                    f"{host} did not answer within {self._idle:g} seconds"
                ) from error
            reason, failure = translated(error, host)
            if reason is not None:
                self._metrics.upstream_failed(reason)
            raise failure from error
        except ValueError as error:
            raise UpstreamUnavailable(f"{host} is not the name of a host") from error
        finally:
            if timer.active():
                timer.cancel()
        answered = HttpResponse(url, response, self._clock, self._idle, self._metrics)
        if not 200 <= response.code < 600:
            answered.cancel()
            self._metrics.upstream_failed("dropped")
            raise TransientUpstreamError(f"{host} sent something that is not HTTP")
        self._metrics.upstream_responded(response.code)
        response.headers.removeHeader(b"content-encoding")
        _move(response.headers, _HIDDEN, b"content-encoding")
        return answered

    async def close(self) -> None:
        """Closes idle connections."""
        if self._pool is not None:
            await self._pool.closeCachedConnections()


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value) if value else None
    except (ValueError, OverflowError):
        return None
    return date if date is not None and date.tzinfo is not None else None
