"""One HTTP connection of an untrusted client: bounded headers, bodies and times.

Twisted's own channel lets a client keep a connection open with one header byte a minute. It writes
any request body to a temporary file, and drops oversized input without an answer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel

from obdelta.net.client_address import host_of
from obdelta.net.http_limits import (
    ABANDONED_PER_SECOND,
    BEGINS_REQUEST,
    FEW_CONNECTIONS,
    LENGTH_DIGITS,
    MAX_ABANDONED,
    TLS_HANDSHAKE,
    Malformed,
    checked_target,
    has_disconnected,
    has_unread_bytes,
    limit_buffer,
    refusal,
)

if TYPE_CHECKING:
    from obdelta.net.http_server import BoundedSite

_EXTRA_SECONDS = 5.0
"""Extra seconds, granted a few times, for a client whose bytes are still unread when
its time ends.
"""
_SMALL_BUFFER = 1 << 14
"""Maximum number of bytes that a connection with a small buffer holds, and writes at once."""
_REFUSAL_SECONDS = 2.0
"""Seconds that a refused client gets to read the answer."""


class _State(enum.Enum):
    HEADER = enum.auto()
    BODY = enum.auto()
    BUSY = enum.auto()  # the application has the request
    IDLE = enum.auto()  # between two requests
    REFUSED = enum.auto()  # a refusal was sent; later input is discarded


class BoundedChannel(HTTPChannel):
    """One connection of a :class:`~obdelta.net.http_server.BoundedSite`, under the site's limits.

    A request over a bound gets its status and a reason in the registry's JSON, then the connection
    closes.
    """

    transport: Any
    site: BoundedSite
    timeOut: Any
    _log = Logger()
    _state = _State.HEADER
    _lines = _header_bytes = _header_count = _body_bytes = 0
    _extensions = 10
    _crowded = False
    _release: Callable[[], None] | None = None
    _address = ""

    def connectionMade(self) -> None:
        """Counts the connection. One far over the limit is dropped at once, before it costs a TLS
        handshake.
        """
        self.MAX_LENGTH = self.site.bounds.line
        # This class makes refusals with their proper statuses. Twisted's own limits must not act
        # first.
        self.totalHeadersSize = 2 * self.site.bounds.headers
        self.maxHeaders = 2 * self.site.bounds.header_count
        self.timeOut = self.site.bounds.header_time
        HTTPChannel.connectionMade(self)
        self.site.open_connections += 1
        if self.site.open_connections > FEW_CONNECTIONS:
            # Body producers pause earlier. Twisted buffers 64 KiB for each device, besides the
            # kernel's buffer.
            limit_buffer(self.transport, _SMALL_BUFFER)
        peer = self.transport.getPeer()
        key = host_of(peer)
        exempt = self.site.exempt is not None and self.site.exempt.trusts(peer)
        if not key or not self.site.connections.most or exempt:
            return
        self._address = key
        if self.site.abandoned.exceeded(key):
            self._drop()
            return
        self._crowded = self.site.connections.held(key) >= self.site.connections.most
        self._release = self.site.connections.count(key)
        if self.site.connections.held(key) > 2 * self.site.connections.most:
            self._log.info(
                "connection from {peer} dropped: {why}",
                peer=key,
                why=str(self.site.connections.refusal()),
            )
            self._drop()

    def _drop(self) -> None:
        self._state = _State.REFUSED
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Releases what was counted."""
        if self._release is not None:
            self._release()
            self._release = None
        self.site.open_connections -= 1
        if self._state is _State.BUSY and not reason.check(ConnectionAborted):
            self._count_abandoned()
        HTTPChannel.connectionLost(self, reason)

    def _count_abandoned(self) -> None:
        """Records that the client left before its answer was written."""
        if self._address and self.site.abandoned.add(self._address):
            self._log.info(
                "new connections from {peer} are dropped: it abandoned more than {most} requests:"
                " they are accepted again when it abandons fewer than {rate:.0f} a second",
                peer=self._address,
                most=MAX_ABANDONED,
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
            self.setTimeout(self.site.bounds.header_time)

    def timeoutConnection(self) -> None:
        """Ends a connection whose client was too slow, or has finished."""
        if self._state is _State.IDLE:
            HTTPChannel.timeoutConnection(self)
            return
        if (
            self._state in (_State.HEADER, _State.BODY)
            and self._extensions
            and has_unread_bytes(self.transport)
        ):
            # The server is slow here, as under many simultaneous clients.
            self._extensions -= 1
            self.setTimeout(_EXTRA_SECONDS)
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
        if self._state in (_State.HEADER, _State.IDLE) and has_disconnected(self.transport):
            self._count_abandoned()
            self._drop()
            return
        at_start = (
            self._state in (_State.HEADER, _State.IDLE) and not self._lines and not self._buffer
        )
        if at_start and data[:1] and data[0] not in BEGINS_REQUEST:
            tls = data[0] == TLS_HANDSHAKE
            why = "this port speaks HTTP, not TLS" if tls else "this is not HTTP"
            self._refuse(400, "UNSUPPORTED", why)
            return
        HTTPChannel.dataReceived(self, data)

    def lineReceived(self, line: bytes) -> None:
        """Takes a request line or header line within its bounds."""
        if self._state is _State.REFUSED:
            return
        self._lines += 1
        self._header_bytes += len(line) + 2
        if self._header_bytes > self.site.bounds.headers:
            self._refuse(
                431,
                "REQUEST_TOO_LARGE",
                f"{self.site.bounds.headers} bytes of headers are the limit",
            )
            return
        if line[:1] in (b" ", b"\t") and self._method:
            # RFC 9112, section 5.2: proxies may read a folded line differently.
            self._refuse(400, "UNSUPPORTED", "header lines may not be folded")
            return
        HTTPChannel.lineReceived(self, line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuses a request line or header line that is too long."""
        why = f"{self.site.bounds.line} bytes are the limit of a "
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
        if self._header_count > self.site.bounds.header_count:
            self._refuse(
                431,
                "REQUEST_TOO_LARGE",
                f"{self.site.bounds.header_count} headers are the limit",
            )
        elif (
            name.lower() == b"content-length"
            and len(value := value.strip(b" \t")) > LENGTH_DIGITS
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
        """Refuses a request, if needed, before the application sees it."""
        if self._state is _State.REFUSED:
            return
        if self._crowded and self.site.takes_crowded(self._path):
            self.requests[-1].crowded = True
        elif self._crowded:
            error = self.site.connections.refusal()
            self._refuse(429, "TOOMANYREQUESTS", str(error), error.retry_after)
            return
        if self.length != 0 and not self._may_have_body:
            self._refuse_method()
        elif (self.length or 0) > self.site.bounds.body:
            self._refuse_body()
        else:
            self._check_target()

    def _check_target(self) -> None:
        headers = self.requests[-1].requestHeaders
        try:
            self._path = checked_target(self._method, self._path, self._version, headers)
        except Malformed as error:
            self._refuse(400, "UNSUPPORTED", str(error))
            return
        self._state = _State.BODY
        self.setTimeout(self.site.bounds.idle)
        HTTPChannel.allHeadersReceived(self)

    @property
    def _method(self) -> bytes:
        """Returns the request line's method, ``b""`` before it has arrived."""
        return getattr(self, "_command", b"")

    @property
    def _may_have_body(self) -> bool:
        return not self.site.bounds.methods or self._method in self.site.bounds.methods

    def rawDataReceived(self, data: bytes) -> None:
        """Takes pieces of a request body, or of early input for the next request."""
        if self._state is _State.BODY:
            self._body_bytes += len(data)
            if self._body_bytes > 2 * self.site.bounds.body:  # chunked; its framing counts too
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
        allowed = ", ".join(method.decode() for method in self.site.bounds.methods)
        self._refuse(405, "UNSUPPORTED", f"only {allowed} are served here", allow=allowed)

    def _refuse_body(self) -> None:
        if not self._may_have_body:
            self._refuse_method()
            return
        self._refuse(
            413, "SIZE_INVALID", f"{self.site.bounds.body} bytes are the limit of a request body"
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
        self.transport.write(refusal(status, code, why, retry_after, allow=allow))
        # Closing a socket that still receives resets it, and the client would lose the answer. So
        # the client closes first.
        self.setTimeout(_REFUSAL_SECONDS)
