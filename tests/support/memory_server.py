"""A site on a clock of the test, and connections to it in memory."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.concurrency.limits import Limit
from obdelta.net.client_address import TrustedProxies
from obdelta.net.http_limits import HttpBounds
from obdelta.net.http_server import BoundedSite

DEVICE = IPv4Address("TCP", "192.0.2.7", 1)
BOUNDS = HttpBounds(line=1000, headers=3000, header_count=20, body=500, header_time=20, idle=60)
REQUEST = b"GET /v2/ HTTP/1.1\r\nHost: delta.example.com\r\n\r\n"


class Page(Resource):
    """Answers at once, or, for ``/later``, when the test says so."""

    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)
        self.seen: list[tuple[bytes, bytes]] = []
        self.hosts: list[str | None] = []
        self.waiting: list[Request] = []

    def render(self, request: Request) -> Any:
        assert request.content is not None
        self.seen.append((request.path, request.content.read()))
        self.hosts.append(request.getHeader("host"))
        if request.path == b"/later":
            self.waiting.append(request)
            return NOT_DONE_YET
        return b"page"


class Server:
    def __init__(
        self,
        connections: Limit | None = None,
        exempt: TrustedProxies | None = None,
        methods: tuple[bytes, ...] = (),
    ) -> None:
        self.clock, self.page = Clock(), Page()
        bounds = replace(BOUNDS, methods=methods)
        self.site = BoundedSite(
            self.page, reactor=self.clock, bounds=bounds, connections=connections, exempt=exempt
        )

    def connect(self, peer: IAddress = DEVICE) -> Connection:
        return Connection(self, peer)


class Connection:
    def __init__(self, server: Server, peer: IAddress) -> None:
        self.transport: Any = StringTransport(peerAddress=peer)
        self.server = server
        self.protocol = server.site.buildProtocol(peer)  # type: ignore[no-untyped-call] # Twisted's
        self.protocol.makeConnection(self.transport)

    def send(self, *chunks: bytes) -> Connection:
        for chunk in chunks:
            self.protocol.dataReceived(chunk)
        return self

    def dropped(self) -> bool:
        return bool(self.transport.disconnected)

    @property
    def status(self) -> int | None:
        """Returns the status of the only answer so far."""
        answer = self.transport.value()
        assert answer.count(b"HTTP/1.1 ") <= 1
        return int(answer.split()[1]) if answer else None

    def refused_with(self) -> tuple[int, str]:
        """Returns the status and reason of a refusal; the connection must end soon after it."""
        head, _, body = self.transport.value().partition(b"\r\n\r\n")
        assert b"Connection: close" in head and f"Content-Length: {len(body)}".encode() in head
        self.server.clock.advance(5)
        assert self.dropped()
        (error,) = json.loads(body)["errors"]
        return int(head.split()[1]), error["message"]

    def lose(self, why: Exception | None = None) -> None:
        self.protocol.connectionLost(Failure(why or ConnectionError()))

    def abandon(self, request_bytes: bytes = REQUEST) -> Connection:
        """Sends bytes that arrive after the client has closed a real socket."""
        server_end, client_end = socket.socketpair()
        with server_end:
            self.transport.fileno = server_end.fileno
            client_end.close()
            self.send(request_bytes)
        if self.dropped():
            self.lose(ConnectionAborted())
        return self
