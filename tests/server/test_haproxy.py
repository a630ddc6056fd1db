"""Devices, a real haproxy, and our listener behind it: SNI pass-through with send-proxy, and host
routing after TLS.
"""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from obdelta.concurrency.limits import Limit
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.http_server import BoundedSite
from tests.support import haproxy
from tests.support.behind_haproxy import (
    DOWNLOAD,
    HOST,
    PROXIES,
    Device,
    Keys,
    Pages,
    fetch,
    keys,
    listening,
    passed_through,
    proxied,
)
from tests.support.logs import logged
from tests.support.web import reactor

__all__ = ["keys"]
FORGED = ("X-Forwarded-For: 198.51.100.1", "X-Forwarded-Proto: gopher")


@pytest.mark.parametrize("kind", ["pass-through", "host-routing"])
def test_the_overlays_are_valid_and_only_add(kind: str, keys: Keys, tmp_path: Path) -> None:
    plain = haproxy.openbalena(keys.folder / "haproxy.pem", 10443, 10444)
    config = tmp_path / "overlaid.cfg"
    config.write_text(haproxy.overlaid(kind, plain))
    assert "valid" in haproxy.check(
        config
    )  # with delta:443 or delta:80, which no name server here resolves
    lines = iter(config.read_text().splitlines())
    assert all(line in lines for line in plain.splitlines()), "every line is kept, in its order"
    for refused in (config.read_text(), "frontend other\n\tuse_backend x\n", ""):
        with pytest.raises(subprocess.CalledProcessError) as error:
            haproxy.overlaid(kind, refused)
        assert error.value.returncode == 1 and error.value.stdout == b""


@pytest.mark.parametrize("version", ["send-proxy-v2", "send-proxy"])
@pytest_twisted.ensureDeferred
async def test_devices_update_through_tls_pass_through(version: str, keys: Keys) -> None:
    """haproxy does not decrypt TLS, and we see each device's own address, whatever its headers
    say.
    """
    with logged("info", "warn", "error", "critical") as lines:
        async with passed_through(keys) as backend:
            with proxied(
                "pass-through", keys, backend, replace=("send-proxy-v2 check", f"{version} check")
            ) as port:
                for source in ("127.0.0.77", "127.0.0.78", "::1"):
                    answer = await deferToThread(fetch, port, keys, "/who", *FORGED, source=source)
                    assert answer == (200, f"{source} https".encode())
                for name, file in ((HOST, "delta"), ("api.example.com", "haproxy")):
                    device = await deferToThread(Device, port, keys, name=name)
                    assert device.serial == keys.serial(file)
                    device.close()
    # haproxy's health checks (a PROXY header, then the end) are not logged.
    assert [line for line in lines if not line.startswith("certificate in use")] == []


@pytest_twisted.ensureDeferred
async def test_devices_update_through_routing_by_host(keys: Keys) -> None:
    """haproxy ends TLS; the device's address is in the header that haproxy wrote, not in those that
    the device sent.
    """
    site = BoundedSite(Pages(ForwardedClients(PROXIES)), reactor=reactor, exempt=PROXIES)
    async with listening(site) as backend:
        with proxied("host-routing", keys, backend) as port:
            for source in ("127.0.0.77", "::1"):
                answer = await deferToThread(fetch, port, keys, "/who", *FORGED, source=source)
                assert answer == (200, f"{source} https".encode())
            device = await deferToThread(Device, port, keys, name="api.example.com")
            assert device.serial == keys.serial("haproxy")
            device.close()


@pytest.mark.parametrize("kind", ["pass-through", "host-routing"])
@pytest_twisted.ensureDeferred
async def test_an_answer_may_be_held_longer_than_openbalenas_time_outs(
    kind: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pages, "late", 4.0)
    plain = BoundedSite(Pages(ForwardedClients(PROXIES)), reactor=reactor, exempt=PROXIES)
    async with passed_through(keys) if kind == "pass-through" else listening(plain) as backend:
        with proxied(kind, keys, backend, timeout="1500ms") as port:
            assert await deferToThread(fetch, port, keys, "/late") == (200, b"127.0.0.1 https")
        if kind == "host-routing":  # the overlay is the reason
            with proxied(
                kind, keys, backend, timeout="1500ms", replace=("timeout server 16m", "")
            ) as port:
                status, _ = await deferToThread(fetch, port, keys, "/late")
                assert status == 504


@pytest_twisted.ensureDeferred
async def test_a_certificate_swapped_in_mid_download_breaks_nothing(
    keys: Keys, tmp_path: Path
) -> None:
    content = random.Random(5).randbytes(DOWNLOAD)
    file = tmp_path / "file"
    file.write_bytes(content)
    old = keys.serial("delta")
    async with passed_through(keys, file=file) as backend:
        with proxied("pass-through", keys, backend) as port:
            first = await deferToThread(Device, port, keys)
            await deferToThread(first.ask, "/file")
            beginning = await deferToThread(first.read, 100_000)
            keys.issue("delta", HOST)
            new = keys.serial("delta")
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # the file is checked once a second
                second = await deferToThread(Device, port, keys)
                if second.serial == new:
                    break
                await deferToThread(second.close)
                await deferLater(reactor, 0.1)
            await deferToThread(second.ask, "/file")
            rest = await deferToThread(first.read, 1 << 30)
            status, whole = await deferToThread(second.answer)
            first.close()
    assert (first.serial, second.serial) == (old, new)
    head, _, body = (beginning + rest).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and status == 200
    assert (
        hashlib.sha256(body).digest()
        == hashlib.sha256(whole).digest()
        == hashlib.sha256(content).digest()
    )


@pytest_twisted.ensureDeferred
async def test_limits_count_devices_and_not_the_proxy(keys: Keys) -> None:
    limit = Limit(2, "connections from one address")
    async with passed_through(keys, connections=limit) as backend:
        with proxied("pass-through", keys, backend) as port:
            idle = [await deferToThread(Device, port, keys, source="127.0.0.77") for _ in range(2)]
            assert limit.held("127.0.0.77") == 2
            status, body = await deferToThread(fetch, port, keys, "/who", source="127.0.0.77")
            assert (
                status == 429 and b"2 connections from one address at a time are the limit" in body
            )
            assert await deferToThread(fetch, port, keys, "/who", source="127.0.0.78") == (
                200,
                b"127.0.0.78 https",
            )
            for device in idle:
                device.close()


@pytest_twisted.ensureDeferred
async def test_a_proxy_outside_proxy_from_is_refused(keys: Keys) -> None:
    with logged("info") as lines:
        async with passed_through(keys, proxies=TrustedProxies(["192.0.2.0/24"])) as backend:
            with (
                proxied("pass-through", keys, backend) as port,
                pytest.raises((ssl.SSLError, ConnectionError)),
            ):
                await deferToThread(fetch, port, keys, "/who")
    assert any("127.0.0.1 refused: it is not among proxy-from" in line for line in lines)


@pytest_twisted.ensureDeferred
async def test_devices_cannot_bypass_the_proxy(keys: Keys) -> None:
    """The device sends a ClientHello instead of the PROXY header."""
    async with passed_through(keys) as backend:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await deferToThread(fetch, backend, keys, "/who")


def raw_exchange(port: int, keys: Keys, cut: Iterable[slice] | None) -> bytes:
    """Sends a request after a PROXY header; header and ClientHello are sent in the given pieces."""
    context = ssl.create_default_context(cafile=str(keys.ca))
    arriving, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(arriving, leaving, server_hostname=HOST)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        first = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n" + leaving.read()
        for piece in cut if cut is not None else (slice(at, at + 1) for at in range(len(first))):
            raw.sendall(first[piece])

        def through(action: Any, *arguments: Any) -> Any:
            while True:
                try:
                    return action(*arguments)
                except ssl.SSLWantReadError:
                    raw.sendall(leaving.read())
                    if chunk := raw.recv(65536):
                        arriving.write(chunk)
                    else:
                        arriving.write_eof()
                finally:
                    if leaving.pending:
                        raw.sendall(leaving.read())

        through(tls.do_handshake)
        through(
            tls.write, f"GET /who HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
        )
        found = b""
        while True:
            try:
                chunk = through(tls.read, 65536)
            except ssl.SSLZeroReturnError:
                return found
            if not chunk:
                return found
            found += chunk


@pytest.mark.parametrize(
    "cut", [[slice(None)], [slice(46), slice(46, None)], [slice(60), slice(60, None)], None]
)
@pytest_twisted.ensureDeferred
async def test_the_proxy_header_and_client_hello_may_come_in_any_pieces(
    cut: list[slice] | None, keys: Keys
) -> None:
    async with passed_through(keys) as backend:
        answer = await deferToThread(raw_exchange, backend, keys, cut)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"192.0.2.7 https")
