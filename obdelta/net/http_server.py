"""HTTP server for untrusted clients: bounded headers, bodies, times and connections.

Twisted's own channel lets a client keep a connection open with one header byte a minute. It writes
any request body to a temporary file, and drops oversized input without an answer.
"""

from __future__ import annotations

import enum
import json
import re
import select
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES, HTTPChannel
from twisted.web.resource import IResource
from twisted.web.server import Site

from obdelta.concurrency.limits import DecayingLimit, Limit
from obdelta.net.client_address import TrustedProxies, host_of

_PHRASES = {
    400: "Bad Request",
    405: "Method Not Allowed",
    413: "Content Too Large",
    414: "URI Too Long",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
}
_BEGINS_REQUEST = frozenset(
    b"!#$%&'*+-.^_`|~\r\n" + (string.digits + string.ascii_letters).encode()
)
"""Bytes that may begin a request: those of a method (RFC 9110, section 5.6.2), and the empty line
that some clients send first.
"""
_TLS_HANDSHAKE = 0x16
_SINGLE = (b"host", b"authorization")
"""Header fields that may occur once: proxies on the way could pick another one of two."""
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
"""A ``Host`` value, which may be empty (RFC 9110, section 7.2)."""
_ABSOLUTE = re.compile(rb"https?://([^/?]+)([^\x00-\x20]*)", re.IGNORECASE)
"""A request target in absolute form (RFC 9112, section 3.2.2): authority, and path with query."""
LONGEST = 18
"""Most digits of a length."""
FEW = 64
"""Connections that may each buffer much in memory. With more connections, each buffers little."""
_PATIENCE = 5.0
"""Extra seconds, granted a few times, for a client whose bytes are still unread when
its time ends.
"""
_LITTLE = 1 << 14
"""Most bytes that a connection with a small buffer holds, and writes at once."""
_GRACE = 2.0
"""Seconds that a refused client gets to read the answer."""
MOST_ABANDONED = 100
"""Requests that one address may abandon at once: above it, its new connections are closed."""
ABANDONED_PER_SECOND = 10.0
"""Abandoned requests of one address that are forgotten each second."""
_CLOSED_BY_CLIENT = getattr(select, "POLLRDHUP", 0)
"""Linux reports a client's FIN. Elsewhere poll reports only resets, for which it needs no flag."""


def phrase_of(status: int) -> bytes:
    """Returns the reason phrase of a status. Twisted's table ends with RFC 2616."""
    return (
        _PHRASES[status].encode()
        if status in _PHRASES
        else RESPONSES.get(status, b"Unknown Status")
    )


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """Limits of a connection. Sizes in bytes, times in seconds.

    ``line`` bounds the request line and each header line (a token of 16 KiB must fit), ``headers``
    all of them together. ``header_time`` runs to the end of the headers. It begins with the
    connection (TLS handshake included), or with the first byte of a later request. ``idle`` is the
    time between requests, and the time for a request body. ``methods``, where given, are those with
    an answer. Other requests are refused before their body is read.
    """

    line: int = 20 * 1024
    headers: int = 32 * 1024
    header_count: int = 100
    body: int = 1 << 20
    header_time: float = 20.0
    idle: float = 60.0
    methods: tuple[bytes, ...] = ()


class _State(enum.Enum):
    HEADER = enum.auto()
    BODY = enum.auto()
    BUSY = enum.auto()  # the application has the request
    IDLE = enum.auto()  # between two requests
    REFUSED = enum.auto()  # a refusal was sent; later input is discarded


class BoundedChannel(HTTPChannel):
    """One connection under :class:`HttpBounds` and the limit on connections from one address.

    A request over a bound gets its status and a reason in the registry's JSON, then the connection
    closes.
    """

    bounds = HttpBounds()
    connections = Limit(0, "connections from one address")
    abandoned: DecayingLimit | None = None
    exempt: TrustedProxies | None = None
    takes_crowded: Callable[[bytes], bool] = staticmethod(lambda path: False)
    transport: Any
    factory: Any
    timeOut: Any
    _log = Logger()
    _state = _State.HEADER
    _lines = _header_bytes = _header_count = _body_bytes = 0
    _patience = 10
    _crowded = False
    _leave: Callable[[], None] | None = None
    _address = ""

    def connectionMade(self) -> None:
        """Counts the connection. One far over the limit is dropped at once, before it costs a TLS
        handshake.
        """
        self.MAX_LENGTH = self.bounds.line
        # This class makes refusals with their proper statuses. Twisted's own limits must not act
        # first.
        self.totalHeadersSize, self.maxHeaders = (
            2 * self.bounds.headers,
            2 * self.bounds.header_count,
        )
        self.timeOut = self.bounds.header_time
        HTTPChannel.connectionMade(self)
        self.factory.open_connections += 1
        if self.factory.open_connections > FEW:
            self._let_little_wait()
        peer = self.transport.getPeer()
        key = host_of(peer)
        if (
            not key
            or not self.connections.most
            or (self.exempt is not None and self.exempt.trusts(peer))
        ):
            return
        self._address = key
        if self.abandoned is not None and self.abandoned.exceeded(key):
            self._drop()
            return
        self._crowded = self.connections.held(key) >= self.connections.most
        self._leave = self.connections.count(key)
        if self.connections.held(key) > 2 * self.connections.most:
            self._log.info(
                "connection from {peer} dropped: {why}",
                peer=key,
                why=str(self.connections.refusal()),
            )
            self._drop()

    def _drop(self) -> None:
        self._state = _State.REFUSED
        self.transport.abortConnection()

    def _let_little_wait(self) -> None:
        """Pauses body producers earlier. Twisted buffers 64 KiB for each device, besides the
        kernel's buffer.
        """
        below = _socket_below(self.transport)
        if isinstance(below, FileDescriptor):
            below.bufferSize = _LITTLE

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Releases what was counted."""
        if self._leave is not None:
            self._leave()
            self._leave = None
        self.factory.open_connections -= 1
        if self._state is _State.BUSY and not reason.check(ConnectionAborted):
            self._count_abandoned()
        HTTPChannel.connectionLost(self, reason)

    def _count_abandoned(self) -> None:
        """Records that the client left before its answer was written."""
        if self.abandoned is not None and self._address and self.abandoned.add(self._address):
            self._log.info(
                "new connections from {peer} are dropped: it abandoned more than {most} requests:"
                " they are accepted again when it abandons fewer than {rate:.0f} a second",
                peer=self._address,
                most=MOST_ABANDONED,
                rate=ABANDONED_PER_SECOND,
            )

    def setTimeout(self, period: float | None) -> Any:
        """Sets the time-out in seconds from now, None for none. Returns the previous one."""
        return TimeoutMixin.setTimeout(self, period)

    def resetTimeout(self) -> None:
        """Called with every chunk. Only the first chunk of a request starts a clock, and no chunk
        restarts it.
        """
        if self._state is _State.IDLE:
            self._state = _State.HEADER
            self.setTimeout(self.bounds.header_time)

    def timeoutConnection(self) -> None:
        """Ends a connection whose client was too slow, or has finished."""
        if self._state is _State.IDLE:
            HTTPChannel.timeoutConnection(self)
            return
        if (
            self._state in (_State.HEADER, _State.BODY)
            and self._patience
            and _unread(self.transport)
        ):
            # The server is slow here, as under many simultaneous clients.
            self._patience -= 1
            self.setTimeout(_PATIENCE)
            return
        if self._state is not _State.REFUSED:
            self._log.info(
                "connection from {peer} dropped: it was too slow",
                peer=host_of(self.transport.getPeer()),
            )
        self.transport.abortConnection()

    def dataReceived(self, data: bytes) -> None:
        """Takes bytes in any chunking. Input that cannot become a request is answered at its first
        byte.

        A TLS ClientHello is the usual case: clients of registries that may be plain try TLS first,
        and wait for an answer.

        A request whose client has closed its side already is dropped, because it would not read the
        answer (Twisted takes half-closed connections for lost). Otherwise a flood of abandoned
        requests would fill the accept queue with dead clients, each at the cost of a whole request.
        """
        if self._state in (_State.HEADER, _State.IDLE) and _gone(self.transport):
            self._count_abandoned()
            self._drop()
            return
        at_start = (
            self._state in (_State.HEADER, _State.IDLE) and not self._lines and not self._buffer
        )
        if at_start and data[:1] and data[0] not in _BEGINS_REQUEST:
            self._refuse(
                400,
                "UNSUPPORTED",
                "this port speaks HTTP, not TLS"
                if data[0] == _TLS_HANDSHAKE
                else "this is not HTTP",
            )
            return
        HTTPChannel.dataReceived(self, data)

    def lineReceived(self, line: bytes) -> None:
        """Takes a request line or header line within its bounds."""
        if self._state is _State.REFUSED:
            return
        self._lines += 1
        self._header_bytes += len(line) + 2
        if self._header_bytes > self.bounds.headers:
            self._refuse(
                431, "REQUEST_TOO_LARGE", f"{self.bounds.headers} bytes of headers are the limit"
            )
            return
        if line[:1] in (b" ", b"\t") and self._method:
            # RFC 9112, section 5.2: proxies may read a folded line differently.
            self._refuse(400, "UNSUPPORTED", "header lines may not be folded")
            return
        HTTPChannel.lineReceived(self, line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuses a request line or header line that is too long."""
        why = f"{self.bounds.line} bytes are the limit of a "
        if self._state is _State.REFUSED:
            return
        if self._lines:
            self._refuse(431, "REQUEST_TOO_LARGE", why + "header")
        else:
            self._refuse(414, "REQUEST_TOO_LARGE", why + "request line")

    def headerReceived(self, line: bytes) -> bool:
        """Checks one whole header."""
        self._header_count += 1
        name, _, value = line.partition(b":")
        if self._header_count > self.bounds.header_count:
            self._refuse(
                431, "REQUEST_TOO_LARGE", f"{self.bounds.header_count} headers are the limit"
            )
        elif (
            name.lower() == b"content-length"
            and len(value := value.strip(b" \t")) > LONGEST
            and value.isdigit()
        ):
            # Python refuses numbers of more than 4300 digits, and Twisted's channel would break on
            # that.
            self._refuse_body()
        elif name.lower() == b"transfer-encoding" and value.strip(b" \t").lower() != b"chunked":
            # Twisted ignores "identity", also beside "chunked". A proxy before this server may see
            # the body end elsewhere.
            self._refuse(400, "UNSUPPORTED", "chunked is the only transfer encoding")
        return self._state is not _State.REFUSED and bool(HTTPChannel.headerReceived(self, line))

    def allHeadersReceived(self) -> None:
        """Refuses a request, where needed, before the application sees it."""
        if self._state is _State.REFUSED:
            return
        if self._crowded and self.takes_crowded(self._path):
            self.requests[-1].crowded = True
        elif self._crowded:
            error = self.connections.refusal()
            self._refuse(429, "TOOMANYREQUESTS", str(error), error.retry_after)
            return
        if self.length != 0 and not self._may_have_body:
            self._refuse_method()
        elif (self.length or 0) > self.bounds.body:
            self._refuse_body()
        elif (why := self._why_malformed()) is not None:
            self._refuse(400, "UNSUPPORTED", why)
        else:
            self._state = _State.BODY
            self.setTimeout(self.bounds.idle)
            HTTPChannel.allHeadersReceived(self)

    @property
    def _method(self) -> bytes:
        """Returns the request line's method, ``b""`` before it has arrived."""
        return getattr(self, "_command", b"")

    @property
    def _may_have_body(self) -> bool:
        return not self.bounds.methods or self._method in self.bounds.methods

    def _why_malformed(self) -> str | None:
        """Returns why RFC 9112 requires a refusal, None for a valid request. Its target then has
        origin form.

        Source: RFC 9112, sections 3.2 (targets, Host) and 5; RFC 9110, sections 4.2.4 and 5.3.
        """
        headers = self.requests[-1].requestHeaders
        for name in _SINGLE:
            if len(headers.getRawHeaders(name, [])) > 1:
                return f"there are several {name.decode()} headers"
        (host,) = headers.getRawHeaders(b"host", [None])
        if host is None and self._version == b"HTTP/1.1":
            return "there is no Host header"
        if host is not None and _HOST.fullmatch(host) is None:
            return "the Host header names no host"
        target: bytes = self._path
        if b"#" in target:
            return "the request target has a fragment"
        if (
            target.startswith(b"/")
            or self._method == b"CONNECT"
            or (target == b"*" and self._method == b"OPTIONS")
        ):
            return None
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or _HOST.fullmatch(absolute[1]) is None:
            return "the request target is no path"
        # The target's own host counts, not the header's.
        headers.setRawHeaders(b"host", [absolute[1]])
        self._path = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        return None

    def rawDataReceived(self, data: bytes) -> None:
        """Takes pieces of a request body, or of early input for the next request."""
        if self._state is _State.BODY:
            self._body_bytes += len(data)
            if self._body_bytes > 2 * self.bounds.body:  # chunked; its framing counts too
                self._refuse_body()
        if self._state is not _State.REFUSED:
            HTTPChannel.rawDataReceived(self, data)

    def allContentReceived(self) -> None:
        """Passes the whole request to the application."""
        if self._state is _State.REFUSED:
            return
        self._state = _State.BUSY
        self._lines = self._header_bytes = self._header_count = self._body_bytes = 0
        HTTPChannel.allContentReceived(self)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Registers a body's producer. It waits while the client still reads the previous answer.

        Over TLS, Twisted tells a connection only once to pause. A body after that would be buffered
        whole.
        """
        HTTPChannel.registerProducer(self, producer, streaming)
        if self._waitingForTransport and self._requestProducer is not None:
            self._requestProducer.pauseProducing()

    def requestDone(self, request: Any) -> None:
        """Called when the answer is written."""
        self._state = _State.IDLE
        HTTPChannel.requestDone(self, request)

    def _refuse_method(self) -> None:
        allowed = ", ".join(method.decode() for method in self.bounds.methods)
        self._refuse(405, "UNSUPPORTED", f"only {allowed} are served here", allow=allowed)

    def _refuse_body(self) -> None:
        if not self._may_have_body:
            self._refuse_method()
            return
        self._refuse(
            413, "SIZE_INVALID", f"{self.bounds.body} bytes are the limit of a request body"
        )

    def _refuse(
        self,
        status: int,
        code: str,
        why: str,
        retry_after: float | None = None,
        *,
        allow: str | None = None,
    ) -> None:
        self._log.info(
            "request from {peer} refused: {status} {why}",
            peer=host_of(self.transport.getPeer()),
            status=status,
            why=why,
        )
        self._state = _State.REFUSED
        self.requests.clear()
        body = (
            json.dumps({"errors": [{"code": code, "message": why, "detail": None}]}).encode()
            + b"\n"
        )
        head = [
            f"HTTP/1.1 {status} {_PHRASES[status]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if allow is not None:
            head.append(f"Allow: {allow}")
        if retry_after is not None:
            head.append(f"Retry-After: {retry_after:.0f}")
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        # Closing a socket that still receives resets it, and the client would lose the answer. So
        # the client closes first.
        self.setTimeout(_GRACE)


def _socket_below(transport: Any) -> Any:
    """Returns the socket's transport below TLS and the PROXY protocol."""
    while (lower := getattr(transport, "transport", None)) is not None:
        transport = lower
    return transport


def _unread(transport: Any) -> bool:
    """Returns whether the client has sent bytes that are still unread. ``transport`` is a socket's,
    or one on top of it.
    """
    return bool(_poll(transport, select.POLLIN))


def _gone(transport: Any) -> bool:
    """Returns whether the client has closed its side or reset the connection. ``transport``: as for
    :func:`_unread`.
    """
    return bool(_poll(transport, _CLOSED_BY_CLIENT))


def _poll(transport: Any, events: int) -> int:
    """Returns those of ``events`` that the socket has now, and POLLHUP and POLLERR in any case."""
    below = _socket_below(transport)
    if not hasattr(below, "fileno") or below.fileno() < 0:
        return 0
    looking = select.poll()
    looking.register(below.fileno(), events)
    return next((found for _, found in looking.poll(0)), 0)


class BoundedSite(Site):
    """A site whose connections are :class:`BoundedChannel`.

    ``connections`` counts by address. Addresses that ``exempt`` trusts are proxies of many clients,
    and are not counted. ``takes_crowded`` selects paths whose requests above the limit reach the
    application, marked ``crowded``; others get 429. TLS clients are offered HTTP/1.1 only.
    ``open_connections`` is the number of open connections.

    An address that abandons more than :data:`MOST_ABANDONED` requests is not accepted for a while.
    This applies where connections are limited.
    """

    open_connections = 0

    protocol = BoundedChannel  # type: ignore[assignment]
    noisy = False

    def __init__(
        self,
        resource: IResource,
        requestFactory: Any = None,
        *,
        reactor: IReactorTime,
        bounds: HttpBounds | None = None,
        connections: Limit | None = None,
        exempt: TrustedProxies | None = None,
        takes_crowded: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        Site.__init__(self, resource, requestFactory, reactor=reactor)
        self._bounds = bounds or HttpBounds()
        self._connections = connections or Limit(0, "connections from one address")
        self._exempt, self._takes_crowded = exempt, takes_crowded
        self._abandoned = DecayingLimit(reactor, MOST_ABANDONED, ABANDONED_PER_SECOND)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Returns a channel under this site's bounds."""
        channel: Any = Site.buildProtocol(self, addr)
        channel.bounds, channel.connections, channel.exempt = (
            self._bounds,
            self._connections,
            self._exempt,
        )
        channel.takes_crowded, channel.abandoned = self._takes_crowded, self._abandoned
        return channel

    def acceptableProtocols(self) -> list[bytes]:
        """Returns the protocols for ALPN."""
        return [b"http/1.1"]
