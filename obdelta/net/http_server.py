"""HTTP as strangers may speak it: bounded headers, bounded bodies, bounded time, bounded
connections.

Twisted's own channel lets a client keep a connection for ever by sending a header byte a minute,
writes any request body to a temporary file, and drops what is too long without a word.
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
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from twisted.web.http import RESPONSES, HTTPChannel
from twisted.web.resource import IResource
from twisted.web.server import Site

from obdelta.concurrency.limits import Limit
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
"""What a method may begin with (RFC 9110, section 5.6.2), and the empty line that some clients send
before it.
"""
_TLS_HANDSHAKE = 0x16
_SINGLE = (b"host", b"authorization")
"""Header fields that decide who asks whom for what: two of one kind could be read differently by
others on the way.
"""
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
"""A ``Host``, which may be empty (RFC 9110, section 7.2)."""
_ABSOLUTE = re.compile(rb"https?://([^/?]+)([^\x00-\x20]*)", re.IGNORECASE)
"""A target in absolute form (RFC 9112, section 3.2.2): authority, and path with query."""
LONGEST = 18
"""Digits of a length."""
FEW = 64
"""Connections that may have much wait for them in memory, each; where there are more, each has
little.
"""
_PATIENCE = 5.0
"""Seconds that a client gets in addition, a few times, whose bytes lie here unread when its time is
over.
"""
_LITTLE = 1 << 14
"""Bytes that wait for such a one at most, and one write."""
_GRACE = 2.0
"""Seconds that a refused client gets to read why."""


def phrase_of(status: int) -> bytes:
    """The reason phrase of a status; Twisted's table ends with RFC 2616."""
    return (
        _PHRASES[status].encode()
        if status in _PHRASES
        else RESPONSES.get(status, b"Unknown Status")
    )


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """Sizes in bytes, times in seconds.

    ``line`` bounds the request line and each header line (a token of 16 KiB must fit), ``headers``
    all of them together. ``header_time`` runs from the connection, TLS handshake included, or from
    a later request's first byte to the end of its headers. ``idle`` is how long a connection may
    lie between requests, and how long a request body may take. ``methods``: those that have an
    answer, where that is known here; a request by another one is refused before its body is looked
    at.
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
    BUSY = enum.auto()  # the request is with the application
    IDLE = enum.auto()  # between two requests
    REFUSED = enum.auto()  # a refusal was sent; whatever still comes is thrown away


class BoundedChannel(HTTPChannel):
    """One connection under :class:`HttpBounds` and the limit on connections from one address.

    What is over a bound is answered with its status and a reason in the registry's JSON, then the
    connection closes.
    """

    bounds = HttpBounds()
    connections = Limit(0, "connections from one address")
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

    def connectionMade(self) -> None:
        """Count the connection. Those far over the limit are dropped at once, before they cost a
        TLS handshake.
        """
        self.MAX_LENGTH = self.bounds.line
        # Refusals are made here with their proper statuses; Twisted's own limits must not be
        # reached first.
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
        self._crowded = self.connections.held(key) >= self.connections.most
        self._leave = self.connections.count(key)
        if self.connections.held(key) > 2 * self.connections.most:
            self._log.info(
                "connection from {peer} dropped: {why}",
                peer=key,
                why=str(self.connections.refusal()),
            )
            self._state = _State.REFUSED
            self.transport.abortConnection()

    def _let_little_wait(self) -> None:
        """Whoever makes a body is paused sooner: Twisted lets 64 KiB wait here besides what the
        kernel holds, of each device.
        """
        below = _socket_below(self.transport)
        if isinstance(below, FileDescriptor):
            below.bufferSize = _LITTLE

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Give back what was counted."""
        if self._leave is not None:
            self._leave()
            self._leave = None
        self.factory.open_connections -= 1
        HTTPChannel.connectionLost(self, reason)

    def setTimeout(self, period: float | None) -> Any:
        """Seconds from now on, None for no time-out; gives back what it was."""
        return TimeoutMixin.setTimeout(self, period)

    def resetTimeout(self) -> None:
        """Called with every chunk; a clock is only started by the first one of a request, and none
        is ever put back.
        """
        if self._state is _State.IDLE:
            self._state = _State.HEADER
            self.setTimeout(self.bounds.header_time)

    def timeoutConnection(self) -> None:
        """A client that was too slow, or came to its end."""
        if self._state is _State.IDLE:
            HTTPChannel.timeoutConnection(self)
            return
        if (
            self._state in (_State.HEADER, _State.BODY)
            and self._patience
            and _unread(self.transport)
        ):
            # It is we who are slow, as when a herd comes.
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
        """Whatever comes. What cannot become a request is answered at its first byte, not when time
        is out.

        That is a TLS ClientHello above all: clients of registries that may be plain try TLS first,
        and wait for an answer.
        """
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
        """A request line or header line within its bounds."""
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
            # RFC 9112, section 5.2: what others make of a folded line cannot be known.
            self._refuse(400, "UNSUPPORTED", "header lines may not be folded")
            return
        HTTPChannel.lineReceived(self, line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """A request line or header line out of them."""
        why = f"{self.bounds.line} bytes are the limit of a "
        if self._state is _State.REFUSED:
            return
        if self._lines:
            self._refuse(431, "REQUEST_TOO_LARGE", why + "header")
        else:
            self._refuse(414, "REQUEST_TOO_LARGE", why + "request line")

    def headerReceived(self, line: bytes) -> bool:
        """One whole header."""
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
            # Python makes no number of more than 4300 digits, and Twisted's channel would break
            self._refuse_body()
        elif name.lower() == b"transfer-encoding" and value.strip(b" \t").lower() != b"chunked":
            # Twisted passes over "identity", also beside "chunked"; a proxy before us may end the
            # body elsewhere than we do.
            self._refuse(400, "UNSUPPORTED", "chunked is the only transfer encoding")
        return self._state is not _State.REFUSED and bool(HTTPChannel.headerReceived(self, line))

    def allHeadersReceived(self) -> None:
        """The last point where a request can be refused before the application sees it."""
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
        """The request line's, ``b""`` before it has come."""
        return getattr(self, "_command", b"")

    @property
    def _may_have_body(self) -> bool:
        return not self.bounds.methods or self._method in self.bounds.methods

    def _why_malformed(self) -> str | None:
        """Why RFC 9112 has a request refused; None for a good one, whose target is in origin form
        from now on.

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
        """Pieces of a request body, or of what a client sends ahead."""
        if self._state is _State.BODY:
            self._body_bytes += len(data)
            if self._body_bytes > 2 * self.bounds.body:  # chunked; its framing is counted too
                self._refuse_body()
        if self._state is not _State.REFUSED:
            HTTPChannel.rawDataReceived(self, data)

    def allContentReceived(self) -> None:
        """The request is whole and goes to the application."""
        if self._state is _State.REFUSED:
            return
        self._state = _State.BUSY
        self._lines = self._header_bytes = self._header_count = self._body_bytes = 0
        HTTPChannel.allContentReceived(self)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Whoever makes a body. One that begins while the client still has to take the last answer
        waits for that: over TLS Twisted tells a connection only once to pause, and a body after it
        would be taken into memory whole.
        """
        HTTPChannel.registerProducer(self, producer, streaming)
        if self._waitingForTransport and self._requestProducer is not None:
            self._requestProducer.pauseProducing()

    def requestDone(self, request: Any) -> None:
        """The answer is written."""
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
        # Closing a socket that still receives resets it, and the client would lose the answer: let
        # it close first.
        self.setTimeout(_GRACE)


def _socket_below(transport: Any) -> Any:
    """What TLS, and what reads the PROXY protocol, lie on."""
    while (lower := getattr(transport, "transport", None)) is not None:
        transport = lower
    return transport


def _unread(transport: Any) -> bool:
    """Whether the client has sent what has not been read yet. ``transport``: of a socket, or of
    what lies on one.
    """
    below = _socket_below(transport)
    if not hasattr(below, "fileno") or below.fileno() < 0:
        return False
    looking = select.poll()
    looking.register(below.fileno(), select.POLLIN)
    return bool(looking.poll(0))


class BoundedSite(Site):
    """A site whose connections are :class:`BoundedChannel`.

    ``connections`` counts by address; the addresses that ``exempt`` trusts are proxies that bring
    many clients and are not counted. ``takes_crowded`` says for which paths a request above the
    limit goes to the application, marked ``crowded``; others get 429. Only HTTP/1.1 is offered to
    TLS clients. ``open_connections`` is how many there are.
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

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A channel under this site's bounds."""
        channel: Any = Site.buildProtocol(self, addr)
        channel.bounds, channel.connections, channel.exempt = (
            self._bounds,
            self._connections,
            self._exempt,
        )
        channel.takes_crowded = self._takes_crowded
        return channel

    def acceptableProtocols(self) -> list[bytes]:
        """For ALPN."""
        return [b"http/1.1"]
