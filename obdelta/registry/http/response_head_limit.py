"""Limit on the heads of responses, since Twisted's client buffers headers and interim responses
without a bound.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.web._newclient import HEADER, STATUS, HTTP11ClientProtocol
from twisted.web.client import HTTPConnectionPool, _HTTP11ClientFactory

MAX_HEAD = 256 * 1024
"""Bytes of everything before a body, and perhaps the body's first bytes."""


class _BoundedHead(HTTP11ClientProtocol):
    """A connection that is cut when a head is too long."""

    transport: Any
    _head = 0

    def request(self, request: Any) -> Any:
        """Resets the count for a new response, and keeps its ``Connection`` header.

        Twisted hides that header, which names the headers that must not be passed on.
        """
        self._head = 0
        answer = super().request(request)
        parser: Any = self._parser
        if parser is not None:
            received = parser.headerReceived

            def header_received(name: bytes, value: bytes) -> None:
                received(name, value)
                if name.lower() == b"connection":
                    parser.headers.addRawHeader(name, value)

            parser.headerReceived = header_received
        return answer

    def dataReceived(self, data: bytes) -> None:
        """Counts the bytes of a head, and passes on those of a body."""
        parser: Any = self._parser
        if parser is not None and parser.state in (STATUS, HEADER):
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.abortConnection()
                return
        super().dataReceived(data)  # type: ignore[no-untyped-call] # Twisted's


class _BoundedHeads(_HTTP11ClientFactory):
    noisy = False

    def buildProtocol(self, addr: IAddress | None) -> _BoundedHead:
        return _BoundedHead(self._quiescentCallback)  # type: ignore[no-untyped-call] # Twisted's


def bounded_pool(reactor: IReactorTime) -> HTTPConnectionPool:
    """Returns a pool of connections with :data:`MAX_HEAD`."""
    pool = HTTPConnectionPool(reactor)
    pool._factory = _BoundedHeads  # no public API sets its connections
    return pool
