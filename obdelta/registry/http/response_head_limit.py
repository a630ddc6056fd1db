"""Heads of the upstream's answers, bounded: Twisted's client takes headers, and answers before the
answer, for as long as they come, and keeps them.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.web._newclient import HEADER, STATUS, HTTP11ClientProtocol
from twisted.web.client import HTTPConnectionPool, _HTTP11ClientFactory

MAX_HEAD = 256 * 1024
"""Bytes of all that comes before a body; the body's first bytes may be among them."""


class _BoundedHead(HTTP11ClientProtocol):
    """A connection that is cut in the middle of too long a head."""

    transport: Any
    _head = 0

    def request(self, request: Any) -> Any:
        """A new answer is to come. Twisted keeps its ``Connection`` to itself, which names headers
        that go no further.
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
        """Of a head, or of a body."""
        parser: Any = self._parser
        if parser is not None and parser.state in (STATUS, HEADER):
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.abortConnection()
                return
        super().dataReceived(data)  # type: ignore[no-untyped-call] # Twisted's


class _BoundedHeads(_HTTP11ClientFactory):
    def buildProtocol(self, addr: IAddress | None) -> _BoundedHead:
        return _BoundedHead(self._quiescentCallback)  # type: ignore[no-untyped-call] # Twisted's


def bounded_pool(reactor: Any) -> HTTPConnectionPool:
    """A pool of connections with :data:`MAX_HEAD`."""
    pool = HTTPConnectionPool(reactor)
    pool._factory = _BoundedHeads  # nothing public makes its connections
    return pool
