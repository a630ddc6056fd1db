"""Endpoint strings: which listen, which are refused; a failed start leaves no port open."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import maybeDeferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.web.resource import Resource
from twisted.web.server import Request

from obdelta.errors import SettingsError
from obdelta.net.certificates import Certificates
from obdelta.net.client_address import TrustedProxies
from obdelta.net.http_limits import ACCEPT_AT_ONCE
from obdelta.net.http_server import BoundedSite
from obdelta.net.listen import listen, url
from tests.support.server import free_port
from tests.support.tokens import make_certificate, make_key, private_pem
from tests.support.web import port_number, reactor

LOOPBACK = "tcp:0:interface=127.0.0.1"


def site() -> BoundedSite:
    return BoundedSite(Resource(), reactor=reactor)


def pair(folder: Path) -> tuple[Path, Path]:
    key = make_key("ES256")
    (folder / "a.pem").write_bytes(make_certificate(key, "a.example.com"))
    (folder / "a.key").write_bytes(private_pem(key))
    return folder / "a.pem", folder / "a.key"


def open_to(port: int, *, tls: bool) -> bytes:
    """Returns the first line of an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        connection: Any = raw
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(raw, server_hostname="a.example.com")
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return bytes(connection.recv(1000).split(b"\r\n")[0])


@pytest_twisted.ensureDeferred
async def test_plain_and_tls_endpoints_listen_side_by_side(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path)
    unix = tmp_path / "socket"
    endpoints = [
        LOOPBACK,
        f"ssl:0:interface=127.0.0.1:privateKey={key}:certKey={certificate}",
        f"unix:{unix}",
    ]
    ports = await listen(endpoints, site(), reactor)
    try:
        for port, tls in zip(ports[:2], (False, True), strict=True):
            number = port_number(port)
            assert await deferToThread(open_to, number, tls=tls) == b"HTTP/1.0 404 Not Found"
        assert unix.is_socket()
        plain, secure, local = map(url, ports)
        assert plain == f"http://127.0.0.1:{port_number(ports[0])}"
        assert secure == f"https://127.0.0.1:{port_number(ports[1])}"
        assert local == f"unix:{unix}"
    finally:
        for port in ports:
            await maybeDeferred(port.stopListening)


@pytest.mark.parametrize("proxied", [False, True])
@pytest_twisted.ensureDeferred
async def test_an_address_is_shown_as_a_url(tmp_path: Path, proxied: bool) -> None:
    (port,) = await listen(
        ["tcp6:0:interface=\\:\\:1"],
        site(),
        reactor,
        certificates=Certificates([pair(tmp_path)], reactor.seconds),
        proxies=TrustedProxies(["127.0.0.1"]) if proxied else None,
    )
    try:
        assert url(port) == f"https://[::1]:{port_number(port)}"
    finally:
        await maybeDeferred(port.stopListening)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("nonsense", "a Twisted server endpoint string"),
        ("tcp:http:interface=:x=y", "a Twisted server endpoint string"),
        ("tcp:", "a Twisted server endpoint string"),
        ("ssl:0:privateKey=/nowhere.pem", "a Twisted server endpoint string"),
        ("haproxy:tcp:8080", "proxy-from = proxy-protocol"),
        ("tcp:0:interface=192.0.2.1", "an address that can be listened on"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_endpoint_that_cannot_listen_stops_the_start(endpoint: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why) as refused:
        await listen([LOOPBACK, endpoint], site(), reactor, setting="operator-listen")
    assert str(refused.value).startswith(f"setting operator-listen has the value {endpoint!r}")


@pytest_twisted.ensureDeferred
async def test_a_port_in_use_closes_the_other_endpoints() -> None:
    free = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoints = [f"tcp:{port}:interface=127.0.0.1" for port in (free, taken.getsockname()[1])]
        with pytest.raises(SettingsError, match="Address already in use"):
            await listen(endpoints, site(), reactor)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", free), timeout=5)


@pytest_twisted.ensureDeferred
async def test_wrong_orders_of_tls_and_proxy_header_are_refused(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path)
    endpoint = f"ssl:0:interface=127.0.0.1:privateKey={key}:certKey={certificate}"
    for layers in (
        {"certificates": Certificates([(certificate, key)], reactor.seconds)},
        {"proxies": TrustedProxies(["127.0.0.1"])},
    ):
        with pytest.raises(SettingsError, match="tls-certificate"):
            await listen([endpoint], site(), reactor, **layers)


@pytest_twisted.ensureDeferred
async def test_many_connections_are_accepted_a_few_at_a_time() -> None:
    served = site()
    (port,) = await listen([LOOPBACK], served, reactor)
    herd = [
        socket.create_connection(("127.0.0.1", cast(Any, port.getHost()).port))
        for _ in range(3 * ACCEPT_AT_ONCE)
    ]
    try:
        for turn in (1, 2):
            cast(Any, port).doRead()
            assert served.open_connections == turn * ACCEPT_AT_ONCE
        while served.open_connections < len(herd):
            await deferLater(reactor, 0.01)
    finally:
        for connection in herd:
            connection.close()
        await maybeDeferred(port.stopListening)


class Counted(Resource):
    """Counts requests."""

    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)
        self.seen = 0

    def render(self, request: Request) -> bytes:
        self.seen += 1
        return b"page"


def insecure() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("kind", ["tcp", "unix", "proxy", "tls"])
@pytest_twisted.ensureDeferred
async def test_requests_of_clients_that_have_left_reach_no_site(
    kind: str, how: str, tmp_path: Path
) -> None:
    """Clients on the reactor thread have left before the server reads a byte. Over TLS another
    thread waits for the handshake.
    """
    counted = Counted()
    certificate, key = pair(tmp_path)
    (port,) = await listen(
        [f"unix:{tmp_path / 'socket'}" if kind == "unix" else LOOPBACK],
        BoundedSite(counted, reactor=reactor),
        reactor,
        certificates=Certificates([(certificate, key)], reactor.seconds) if kind == "tls" else None,
        proxies=TrustedProxies(["127.0.0.1"]) if kind == "proxy" else None,
    )
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    if kind == "proxy":
        request = b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n" + request

    async def client() -> Any:
        if kind == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(tmp_path / "socket"))
            return connection
        raw = socket.create_connection(("127.0.0.1", cast(Any, port.getHost()).port), 10)
        if kind == "tls":
            return await deferToThread(insecure().wrap_socket, raw)
        return raw

    try:
        for _ in range(5):
            connection = await client()
            connection.sendall(request)
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if how == "half-close":
                connection.shutdown(socket.SHUT_WR)
                await deferToThread(until_closed, connection)
            connection.close()
        stays = await client()
        stays.sendall(request)
        answer = await deferToThread(stays.recv, 1000)
        stays.close()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert counted.seen == 1
    finally:
        await maybeDeferred(port.stopListening)


def until_closed(connection: Any) -> None:
    connection.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1000):
            pass  # TLS session tickets
