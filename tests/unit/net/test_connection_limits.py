"""Limits of connections and of time: slow, silent, idle, abandoned and many."""

from __future__ import annotations

import socket

import pytest
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionAborted

from obdelta.concurrency.limits import Limit
from obdelta.errors import TooManyRequests
from obdelta.net.client_address import TrustedProxies
from obdelta.net.http_limits import MAX_ABANDONED
from tests.support.logs import logged
from tests.support.memory_server import DEVICE, REQUEST, Server


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
