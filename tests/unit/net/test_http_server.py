"""Limits for strangers: sizes, times and numbers, each exceeded, with the exact answer."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.concurrency.limits import Limit
from obdelta.errors import TooManyRequests
from obdelta.net.client_address import TrustedProxies
from obdelta.net.http_limits import MAX_ABANDONED, HttpBounds
from obdelta.net.http_server import BoundedSite
from tests.support.logs import logged

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


def test_a_request_within_bounds_is_served_however_it_is_cut() -> None:
    for chunks in ([REQUEST], [bytes([byte]) for byte in REQUEST], [REQUEST[:30], REQUEST[30:]]):
        server = Server()
        connection = server.connect().send(*chunks)
        assert connection.status == 200 and not connection.dropped()
        assert server.page.seen == [(b"/v2/", b"")]


@pytest.mark.parametrize(
    ("request_bytes", "status", "why"),
    [
        (b"GET /" + b"a" * 1001, 414, "1000 bytes are the limit of a request line"),
        (
            b"GET /" + b"a" * 1001 + b" HTTP/1.1\r\n\r\n",
            414,
            "1000 bytes are the limit of a request line",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1001,
            431,
            "1000 bytes are the limit of a header",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1001 + b"\r\n\r\n",
            431,
            "1000 bytes are the limit of a header",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n" + (b"X: " + b"a" * 900 + b"\r\n") * 5,
            431,
            "3000 bytes of headers are the limit",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 21 + b"\r\n",
            431,
            "20 headers are the limit",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 22 + b"Y: " + b"a" * 1100,
            431,
            "20 headers are the limit",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n" + b" folded\r\n" * 600 + b"\r\n",
            400,
            "header lines may not be folded",
        ),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 501\r\n\r\n",
            413,
            "500 bytes are the limit of a request body",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\nx",
            413,
            "500 bytes are the limit of a request body",
        ),
        (
            b"POST / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n"
            + b"a" * 255
            + b"\r\n400\r\n"
            + b"b" * 1024,
            413,
            "500 bytes are the limit of a request body",
        ),
    ],
)
def test_each_size_limit_has_its_answer(request_bytes: bytes, status: int, why: str) -> None:
    for size in (len(request_bytes), 100, 1):
        server = Server()
        chunks = [request_bytes[at : at + size] for at in range(0, len(request_bytes), size)]
        with logged("info") as lines:
            connection = server.connect().send(*chunks, b"\r\nGET /again HTTP/1.1\r\n\r\n")
            assert connection.refused_with() == (status, why)
        assert server.page.seen == []
        assert len(lines) == 1 and "192.0.2.7" in lines[0] and str(status) in lines[0]
        connection.lose()
        assert server.clock.getDelayedCalls() == []


def test_bodies_within_bounds_are_taken() -> None:
    server = Server()
    server.connect().send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n" + b"a" * 500)
    server.connect().send(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    assert server.page.seen == [(b"/", b"a" * 500), (b"/", b"abc")]


def test_malformed_requests_never_reach_the_application() -> None:
    for request in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    ):
        server = Server()
        connection = server.connect().send(request)
        assert connection.status == 400 and server.page.seen == []


@pytest.mark.parametrize(
    ("request_bytes", "why"),
    [
        (b"GET /v2/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "there are several host headers"),
        (
            b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: y\r\nhost: b\r\n\r\n",
            "there are several host headers",
        ),
        (b"GET /v2/ HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "there are several host headers"),
        (b"GET /v2/ HTTP/1.1\r\n\r\n", "there is no Host header"),
        (b"GET http://a/v2/ HTTP/1.1\r\n\r\n", "there is no Host header"),
        (b"GET /v2/ HTTP/1.1\r\nHost: a b\r\n\r\n", "the Host header names no host"),
        (b"GET /v2/ HTTP/1.1\r\nHost: a, b\r\n\r\n", "the Host header names no host"),
        (b"GET /v2/ HTTP/1.1\r\nHost: a/b\r\n\r\n", "the Host header names no host"),
        (b"GET /v2/ HTTP/1.1\r\nHost: u@a\r\n\r\n", "the Host header names no host"),
        (
            (
                b"GET /v2/ HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nAuthorization: Bearer"
                b" y\r\n\r\n"
            ),
            "there are several authorization headers",
        ),
        (b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n", "header lines may not be folded"),
        (b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: y\r\n\t\r\n\r\n", "header lines may not be folded"),
        (b"GET /v2/ HTTP/1.1\r\n Host: a\r\n\r\n", "header lines may not be folded"),
        (b"\r\nGET /v2/ HTTP/1.1\r\nHost: a\r\n X: y\r\n\r\n", "header lines may not be folded"),
        (b"GET /v2/#x HTTP/1.1\r\nHost: a\r\n\r\n", "the request target has a fragment"),
        (b"GET http://a/v2/#x HTTP/1.1\r\nHost: a\r\n\r\n", "the request target has a fragment"),
        (b"GET v2/ HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
        (b"GET ftp://a/v2/ HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
        (b"GET http:///v2/ HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
        (b"GET http://u:p@a/v2/ HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
        (b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "the request target is no path"),
    ],
)
def test_requests_that_rfc_9112_forbids_are_refused(request_bytes: bytes, why: str) -> None:
    for size in (len(request_bytes), 1):
        server = Server()
        chunks = [request_bytes[at : at + size] for at in range(0, len(request_bytes), size)]
        assert server.connect().send(*chunks).refused_with() == (400, why)
        assert server.page.seen == []


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://delta.example.com/v2/", b"/v2/", "delta.example.com"),
        (b"HTTPS://delta.example.com:8443/v2/?n=1", b"/v2/", "delta.example.com:8443"),
        (b"http://delta.example.com", b"/", "delta.example.com"),
        (b"http://delta.example.com?src=x", b"/", "delta.example.com"),
        (b"http://[::1]:80/v2/", b"/v2/", "[::1]:80"),
        (b"//v2/", b"//v2/", "other"),
    ],
)
def test_a_target_in_absolute_form_is_accepted(target: bytes, path: bytes, host: str) -> None:
    server = Server()
    for version in (b"1.1", b"1.0"):
        assert (
            server.connect()
            .send(b"GET %s HTTP/%s\r\nHost: other\r\n\r\n" % (target, version))
            .status
            == 200
        )
    assert server.page.seen == [(path, b"")] * 2
    assert server.page.hosts == [host] * 2


def test_http_1_0_needs_no_host() -> None:
    server = Server()
    assert server.connect().send(b"GET /v2/ HTTP/1.0\r\n\r\n").status == 200
    assert server.connect().send(b"GET /v2/ HTTP/1.1\r\nHost:\r\n\r\n").status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"PUT /v2/app/manifests/x HTTP/1.1\r\nHost: a\r\nContent-Length: 501\r\n\r\n",
        b"PUT /v2/app/manifests/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
        b"PUT /v2/app/manifests/x HTTP/1.1\r\nHost: a\r\nContent-Length: "
        + b"9" * 30
        + b"\r\n\r\n",
        b"PATCH /v2/app/blobs/uploads/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 99999\r\n\r\n",
    ],
)
def test_an_unknown_method_is_refused_before_its_body_is_read(
    request_bytes: bytes,
) -> None:
    server = Server(methods=(b"GET", b"HEAD"))
    connection = server.connect().send(request_bytes)
    assert b"\r\nAllow: GET, HEAD\r\n" in connection.transport.value()
    assert connection.refused_with() == (405, "only GET, HEAD are served here")
    assert server.page.seen == []
    assert (
        server.connect()
        .send(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 501\r\n\r\n")
        .refused_with()[0]
        == 413
    )


CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (CLIENT_HELLO, "this port speaks HTTP, not TLS"),
        (CLIENT_HELLO[:1], "this port speaks HTTP, not TLS"),
        (b"\x00", "this is not HTTP"),
        (b" GET / HTTP/1.1", "this is not HTTP"),
        (b"\xff\xf4", "this is not HTTP"),
    ],
)
def test_bytes_that_are_no_http_are_refused_at_the_first_byte(sent: bytes, why: str) -> None:
    """Engines try TLS with registries that may be plain: a server that waits for the end of such a
    request would delay each pull.
    """
    for before in (b"", REQUEST):
        server = Server()
        connection = server.connect().send(*filter(None, [before]))
        connection.transport.clear()
        connection.send(sent, b"\r\n\r\n" + REQUEST)
        assert connection.refused_with() == (400, why)
        assert len(server.page.seen) == bool(before)


def test_first_bytes_inside_a_request_are_not_checked() -> None:
    """Header values, bodies and pipelined bytes may have any value."""
    server = Server()
    body = CLIENT_HELLO + b"\x00"
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    server.connect().send(b"\r\n", head[:30], head[30:], *(bytes([byte]) for byte in body))
    server.connect().send(head + body + REQUEST)
    assert server.page.seen == [(b"/", body), (b"/", body), (b"/v2/", b"")]


def test_slow_headers_are_dropped() -> None:
    """Single bytes do not extend the time, which is for all headers together."""
    server = Server()
    connection = server.connect()
    for byte in REQUEST[:19]:
        server.clock.advance(1)
        connection.send(bytes([byte]))
        assert not connection.dropped()
    server.clock.advance(1)
    assert connection.dropped() and connection.status is None and server.page.seen == []


def test_a_silent_connection_is_dropped() -> None:
    server = Server()
    connection = server.connect()
    server.clock.advance(20)
    assert connection.dropped()


def test_a_client_that_waits_for_the_server_is_not_slow() -> None:
    """A client's bytes are still unread in our socket when its time is over, as when a herd comes:
    it gets more time, for a while.
    """
    server_end, client_end = socket.socketpair()
    with server_end, client_end:
        server = Server()
        waiting, slow = server.connect(), server.connect()
        waiting.transport.fileno = server_end.fileno
        client_end.send(b"G")
        server.clock.advance(20)
        assert slow.dropped() and not waiting.dropped()
        server.clock.advance(5)
        assert not waiting.dropped()
        assert waiting.send(server_end.recv(1), REQUEST[1:]).status == 200
        drip = server.connect()
        drip.transport.fileno = server_end.fileno
        client_end.send(b"G")
        server.clock.pump([20, *[5] * 9])
        assert not drip.dropped()
        server.clock.advance(5)
        assert drip.dropped()


def test_slow_bodies_are_dropped() -> None:
    server = Server()
    connection = server.connect().send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n")
    for _ in range(59):
        server.clock.advance(1)
        connection.send(b"a")
    assert not connection.dropped()
    server.clock.advance(1)
    assert connection.dropped() and server.page.seen == []


def test_idle_time_and_request_time_have_separate_limits() -> None:
    server = Server()
    connection = server.connect()
    for _ in range(3):
        server.clock.advance(15)
        connection.send(REQUEST)
        assert connection.status == 200
        connection.transport.clear()
        server.clock.advance(59)
        connection.send(b"GET")
        server.clock.advance(19)
        assert not connection.dropped()
        connection.send(REQUEST[3:])
        connection.transport.clear()
    server.clock.advance(60)
    assert connection.transport.disconnecting


def test_an_answer_may_take_long() -> None:
    server = Server()
    connection = server.connect().send(
        b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v2/ HTTP/1.1\r\n"
    )
    server.clock.advance(3600)
    connection.send(b"Host: x\r\n\r\n")
    assert not connection.dropped() and server.page.seen == [(b"/later", b"")]
    server.page.waiting.pop().finish()
    assert server.page.seen == [(b"/later", b""), (b"/v2/", b"")]


def test_connections_of_one_address_are_limited() -> None:
    server = Server(Limit(3, "connections from one address"))
    first = [server.connect() for _ in range(3)]
    with logged("info") as lines:
        fourth = server.connect().send(REQUEST)
        assert fourth.transport.value().startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert b"\r\nRetry-After: 10\r\n" in fourth.transport.value()
        why = "too many requests: 3 connections from one address at a time are the limit"
        assert fourth.refused_with() == (429, why)
    assert any("192.0.2.7" in line and "429" in line for line in lines)
    assert server.page.seen == []
    assert server.connect(IPv4Address("TCP", "192.0.2.8", 1)).send(REQUEST).status == 200
    # Existing connections continue, and one that closes makes room.
    for connection in first:
        assert connection.send(REQUEST).status == 200
    fourth.lose()
    first.pop().lose()
    assert server.connect().send(REQUEST).status == 200


def test_connections_far_over_the_limit_get_no_answer() -> None:
    limit = Limit(3, "connections from one address")
    server = Server(limit)
    connections = [server.connect() for _ in range(6)]
    assert not any(connection.dropped() for connection in connections)
    seventh = server.connect()
    assert seventh.dropped()
    seventh.send(REQUEST)
    assert seventh.status is None and server.page.seen == []
    for connection in (*connections, seventh):
        connection.lose()
    assert limit.held("192.0.2.7") == 0 and limit._held == {}


def test_proxies_that_bring_many_clients_are_not_counted() -> None:
    limit = Limit(1, "connections from one address")
    server = Server(limit, TrustedProxies(["192.0.2.0/24"]))
    for peer in (DEVICE, DEVICE, UNIXAddress("/run/x"), UNIXAddress("/run/x")):
        assert server.connect(peer).send(REQUEST).status == 200
    assert limit._held == {}


def test_without_a_limit_nothing_is_counted() -> None:
    server = Server(Limit(0, "connections from one address"))
    assert [server.connect().send(REQUEST).status for _ in range(10)] == [200] * 10


def test_a_limit_refuses_and_later_forgets() -> None:
    limit = Limit(2, "requests of one subject")
    with limit.hold("a"), limit.hold("a"), limit.hold("b"):
        with pytest.raises(
            TooManyRequests, match="2 requests of one subject at a time are the limit"
        ) as refused:
            limit.take("a")
        assert refused.value.retry_after
        assert limit.held("a") == 2
        limit.take("b")()
    with pytest.raises(KeyError), limit.hold("a"):
        raise KeyError
    give_back = limit.take("a")
    give_back()
    give_back()
    assert limit._held == {}


LATER = b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n"
OTHER = IPv4Address("TCP", "192.0.2.8", 1)


def limited(exempt: TrustedProxies | None = None) -> Server:
    return Server(Limit(1000, "connections from one address"), exempt)


def test_an_abandoned_request_does_not_reach_the_application() -> None:
    server = Server()
    assert server.connect().abandon().dropped()
    assert server.connect().send(REQUEST[:20]).abandon(REQUEST[20:]).dropped()
    assert server.page.seen == []
    assert server.connect().send(REQUEST).abandon().dropped(), "between two requests"
    assert server.page.seen == [(b"/v2/", b"")]
    assert server.site.open_connections == 0 and server.clock.getDelayedCalls() == []


def test_a_client_that_stays_has_its_queued_bytes_served() -> None:
    server_end, client_end = socket.socketpair()
    with server_end, client_end:
        server = Server()
        connection = server.connect()
        connection.transport.fileno = server_end.fileno
        assert connection.send(REQUEST).status == 200


def test_without_pollrdhup_resets_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdelta.net.http_limits._CLOSED_BY_CLIENT", 0)
    server = Server()
    assert server.connect().abandon().dropped()
    assert server.page.seen == []
    server_end, client_end = socket.socketpair()
    with server_end, client_end:
        client_end.shutdown(socket.SHUT_WR)
        connection = server.connect()
        connection.transport.fileno = server_end.fileno
        assert connection.send(REQUEST).status == 200


@pytest.mark.parametrize("busy", [False, True])
def test_an_address_that_abandons_many_requests_is_not_accepted_for_a_while(busy: bool) -> None:
    """The client leaves before the application has the request, and while it works on it."""
    server = limited()

    def abandon_one() -> None:
        if busy:
            server.connect().send(LATER).lose()
        else:
            server.connect().abandon()

    with logged("info") as lines:
        for _ in range(MAX_ABANDONED):
            abandon_one()
        assert not server.connect().dropped() and lines == []
        abandon_one()
        seen = len(server.page.seen)
        for _ in range(1000):
            connection = server.connect().send(REQUEST)
            assert connection.dropped() and connection.status is None
            connection.lose(ConnectionAborted())
        assert len(server.page.seen) == seen == (MAX_ABANDONED + 1) * busy
    assert len(lines) == 1 and "192.0.2.7" in lines[0]
    assert server.connect(OTHER).send(REQUEST).status == 200
    server.clock.advance(1)
    assert server.connect().send(REQUEST).status == 200


def test_a_device_that_reconnects_is_never_dropped() -> None:
    """Ten abandoned requests in each second, for a minute."""
    server = limited()
    for _ in range(60):
        for _ in range(5):
            server.connect().send(LATER).lose()
            server.connect().abandon()
        connection = server.connect().send(REQUEST)
        assert connection.status == 200
        connection.lose()
        server.clock.advance(1)


def test_requests_that_do_not_count_as_abandoned() -> None:
    """Complete answers, connections without a request, and answers that the server cuts."""
    server = limited()
    for _ in range(2 * MAX_ABANDONED):
        server.connect().lose()
        server.connect().send(REQUEST).lose()
        server.connect().send(REQUEST[:20]).lose()
        server.connect().send(LATER).lose(ConnectionAborted())
    assert server.connect().send(REQUEST).status == 200


def test_abandoned_requests_of_proxies_are_not_counted() -> None:
    proxy, private = DEVICE, UNIXAddress("/run/x")
    for server in (limited(TrustedProxies(["192.0.2.0/24"])), Server()):
        for peer in (proxy, private):
            for _ in range(2 * MAX_ABANDONED):
                server.connect(peer).abandon()
                server.connect(peer).send(LATER).lose()
            assert server.connect(peer).send(REQUEST).status == 200
