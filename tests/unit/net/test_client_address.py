"""Connections through a proxy: which peers may name a client, when the inner protocol is created,
and forwarding headers.
"""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.test.requesthelper import DummyRequest

from obdelta.errors import SettingsError
from obdelta.net.client_address import (
    HEADER_TIMEOUT,
    ForwardedClients,
    ProxiedFactory,
    TrustedProxies,
    host_of,
)
from obdelta.settings.address_parsers import PRIVATE_NETWORKS
from tests.support.logs import logged

PROXY = IPv4Address("TCP", "172.18.0.3", 40000)
HEADER = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"
LOCAL = b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
PRIVATE = TrustedProxies(PRIVATE_NETWORKS)


class Inner(Protocol):
    """Records its calls."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: list[Failure] = []
        self.peers: list[IAddress] = []

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.peers.append(self.transport.getPeer())
        self.transport.write(b"hello")

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = Failure(ValueError())) -> None:  # noqa: B008 - the interface's own form
        self.lost.append(reason)


class InnerFactory(Factory[Inner]):
    def __init__(self) -> None:
        self.addresses: list[IAddress | None] = []
        self.built: list[Inner] = []
        self.refuses = False

    def buildProtocol(self, addr: IAddress | None) -> Inner | None:
        self.addresses.append(addr)
        if self.refuses:
            return None
        self.built.append(Inner())
        return self.built[-1]


class Connection:
    """One accepted connection, from an address."""

    def __init__(self, peer: IAddress = PROXY) -> None:
        self.clock = Clock()
        self.inner = InnerFactory()
        self.outer = ProxiedFactory(self.inner, PRIVATE, self.clock)
        self.transport: Any = StringTransport(peerAddress=peer)
        self.protocol = self.outer.buildProtocol(peer)
        self.protocol.makeConnection(self.transport)

    @property
    def aborted(self) -> bool:
        return bool(self.transport.disconnected)

    def lose(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionError()))
        assert self.clock.getDelayedCalls() == []
        assert not self.outer.protocols


def test_the_inner_protocol_sees_the_client_from_the_first_moment() -> None:
    connection = Connection()
    for byte in HEADER[:-1]:
        connection.protocol.dataReceived(bytes([byte]))
        assert connection.inner.addresses == []
    connection.protocol.dataReceived(HEADER[-1:] + b"first")
    client = IPv4Address("TCP", "192.0.2.7", 56324)
    (inner,) = connection.inner.built
    assert connection.inner.addresses == [client] and inner.peers == [client]
    assert inner.received == b"first"
    connection.protocol.dataReceived(b" and PROXY more")
    assert inner.received == b"first and PROXY more"
    assert connection.transport.value() == b"hello"
    assert connection.protocol.getHost() == IPv4Address("TCP", "198.51.100.1", 443)
    connection.clock.advance(10 * HEADER_TIMEOUT)
    assert not connection.aborted
    connection.lose()
    assert len(inner.lost) == 1


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN\r\n"])
def test_a_health_check_of_the_proxy_has_the_proxys_address(header: bytes) -> None:
    connection = Connection()
    connection.protocol.dataReceived(header)
    assert connection.inner.addresses == [PROXY]
    # haproxy's health check: a header, then the end before any TLS
    connection.lose()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"PROXY TCP4 a b c d\r\n", LOCAL[:12] + b"\x00"],
)
def test_a_connection_without_the_header_is_refused(data: bytes) -> None:
    connection = Connection()
    with logged("info") as lines:
        connection.protocol.dataReceived(data)
    assert (
        connection.aborted
        and connection.inner.addresses == []
        and connection.transport.value() == b""
    )
    assert len(lines) == 1 and "172.18.0.3" in lines[0]
    connection.protocol.dataReceived(HEADER + b"more")
    assert connection.inner.addresses == []
    connection.lose()


def test_a_missing_header_times_out() -> None:
    connection = Connection()
    for _ in range(4):
        connection.protocol.dataReceived(b"")
        connection.clock.advance(HEADER_TIMEOUT / 4)
    assert connection.aborted and connection.inner.addresses == []
    connection.lose()


@pytest.mark.parametrize(
    "stranger",
    [
        IPv4Address("TCP", "203.0.113.9", 1),
        IPv6Address("TCP", "2001:db8::1", 1),
        IPv6Address("TCP", "::ffff:203.0.113.9", 1),
    ],
)
def test_an_untrusted_address_cannot_send_the_header(stranger: IAddress) -> None:
    connection = Connection(stranger)
    assert connection.aborted
    connection.protocol.dataReceived(HEADER)
    assert connection.inner.addresses == []
    connection.lose()


@pytest.mark.parametrize(
    "proxy",
    [
        IPv4Address("TCP", "127.0.0.1", 1),
        IPv4Address("TCP", "192.168.7.9", 1),
        IPv6Address("TCP", "::1", 1),
        IPv6Address("TCP", "::ffff:10.0.0.9", 1),
        IPv6Address("TCP", "fd00::1", 1),
        IPv6Address("TCP", "fe80::1%eth0", 1),
        UNIXAddress("/run/proxy"),
    ],
)
def test_private_networks_and_unix_sockets_can_send_the_header(proxy: IAddress) -> None:
    connection = Connection(proxy)
    connection.protocol.dataReceived(HEADER)
    assert len(connection.inner.addresses) == 1
    connection.lose()


def test_an_inner_factory_may_refuse_a_client() -> None:
    connection = Connection()
    connection.inner.refuses = True
    connection.protocol.dataReceived(HEADER + b"x")
    assert connection.aborted
    connection.lose()


def test_invalid_networks_are_refused() -> None:
    for text in ("10.0.0.0/33", "delta.example.com", "10.0.0.1/8", ""):
        with pytest.raises(SettingsError, match="proxy-from"):
            TrustedProxies([text])
    exact = TrustedProxies(["192.0.2.7"])
    assert exact.trusts(IPv4Address("TCP", "192.0.2.7", 1)) and not exact.trusts(
        IPv4Address("TCP", "192.0.2.8", 1)
    )
    assert not TrustedProxies([]).trusts(IPv4Address("TCP", "127.0.0.1", 1)) and not PRIVATE.trusts(
        None
    )


def test_the_host_of_an_address() -> None:
    assert host_of(IPv6Address("TCP", "::ffff:192.0.2.7", 1)) == "192.0.2.7"
    assert host_of(IPv6Address("TCP", "2001:DB8::0:1", 1)) == "2001:db8::1"
    assert host_of(UNIXAddress(None)) == "" == host_of(None)


class Request(DummyRequest):
    """A request from one address, with header lines as they came."""

    def __init__(self, peer: IAddress, *headers: tuple[str, str], secure: bool = False) -> None:
        super().__init__([b""])
        self._peer, self._secure = peer, secure
        for name, value in headers:
            self.requestHeaders.addRawHeader(name.encode(), value.encode())

    def getClientAddress(self) -> IAddress:
        return self._peer

    def isSecure(self) -> bool:
        return self._secure


DEVICE = IPv4Address("TCP", "203.0.113.9", 1)


@pytest.mark.parametrize(
    ("peer", "headers", "expected"),
    [
        (PROXY, [], "172.18.0.3"),
        (PROXY, ["192.0.2.7"], "192.0.2.7"),
        (PROXY, ["2001:DB8::7"], "2001:db8::7"),
        (PROXY, ["[2001:db8::7]"], "2001:db8::7"),
        (PROXY, ["::ffff:192.0.2.7"], "192.0.2.7"),
        # Only the proxy's own entry is trusted: the last entry of the last line.
        (PROXY, ["198.51.100.1, 192.0.2.7"], "192.0.2.7"),
        (PROXY, ["198.51.100.1", "192.0.2.7"], "192.0.2.7"),
        (PROXY, ["192.0.2.7", "198.51.100.1,garbage"], "172.18.0.3"),
        (PROXY, ["garbage"], "172.18.0.3"),
        (PROXY, [""], "172.18.0.3"),
        (PROXY, ["192.0.2.7:1234"], "172.18.0.3"),
        (PROXY, ["192.0.2.7\n"], "192.0.2.7"),
        # A client that is no proxy cannot change its address.
        (DEVICE, ["192.0.2.7"], "203.0.113.9"),
        (UNIXAddress("/run/proxy"), ["192.0.2.7"], "192.0.2.7"),
        (UNIXAddress("/run/proxy"), [], ""),
    ],
)
def test_the_client_follows_from_x_forwarded_for(
    peer: IAddress, headers: list[str], expected: str
) -> None:
    lines = [("X-Forwarded-For", value) for value in headers]
    assert ForwardedClients(PRIVATE).address(Request(peer, *lines)) == expected  # type: ignore[arg-type]


def test_forwarding_headers_count_only_where_tls_ends_before_us() -> None:
    lines = [("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "https")]
    proxied: Any = Request(PROXY, *lines)
    passed_through: Any = Request(PROXY, *lines, secure=True)
    assert ForwardedClients(PRIVATE).address(passed_through) == "172.18.0.3"
    assert ForwardedClients(None).address(proxied) == "172.18.0.3"
    assert ForwardedClients(PRIVATE).secure(proxied) and ForwardedClients(None).secure(
        passed_through
    )
    assert not ForwardedClients(None).secure(proxied)
    stranger: Any = Request(DEVICE, *lines)
    assert not ForwardedClients(PRIVATE).secure(stranger)
    plain: Any = Request(PROXY, ("X-Forwarded-Proto", "https"), ("X-Forwarded-Proto", "http"))
    assert not ForwardedClients(PRIVATE).secure(plain)
