"""A device that reaches a site of the test through HAProxy, configured as openBalena's."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from twisted.internet.defer import maybeDeferred
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.concurrency.limits import Limit
from obdelta.net.certificates import Certificates
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.http_server import BoundedSite
from obdelta.net.listen import listen
from obdelta.settings.address_parsers import PRIVATE_NETWORKS
from obdelta.web.devices.responses import Stored, send_stored
from tests.support import haproxy
from tests.support.server import free_port
from tests.support.tokens import make_certificate, make_key, private_pem
from tests.support.web import port_number, reactor

HOST = "delta.example.com"
DOWNLOAD = 24 * 1024 * 1024


class Pages(Resource):
    """``/who`` returns the client's address, ``/late`` does so after ``late`` seconds, ``/file``
    is a large body.
    """

    isLeaf = True
    late = 0.0

    def __init__(self, clients: ForwardedClients, file: Path | None = None) -> None:
        Resource.__init__(self)
        self._clients, self._file = clients, file

    def render_GET(self, request: Request) -> Any:
        if request.path == b"/healthz":
            return b"ok\n"
        if request.path == b"/file" and self._file is not None:
            send_stored(request, Stored.open(self._file, DOWNLOAD, '"x"', {}))
            return NOT_DONE_YET
        who = (
            f"{self._clients.address(request)}"
            f" {'https' if self._clients.secure(request) else 'http'}".encode()
        )
        if request.path != b"/late":
            return who
        request.setHeader(b"content-length", str(len(who)).encode())
        reactor.callLater(self.late, lambda: (request.write(who), request.finish()))
        return NOT_DONE_YET


class Keys:
    """A CA, and certificates that it signs, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = make_key("ES256")
        self._pem = make_certificate(self._key, "ca.example.com")
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self._pem)

    def issue(self, file: str, name: str) -> tuple[Path, Path]:
        """Write (again) ``<file>.pem``, which holds a host's certificate and its key, and give it
        for both.
        """
        key = make_key("ES256")
        certificate = make_certificate(
            key, name, signer=(x509.load_pem_x509_certificate(self._pem), self._key)
        )
        path = self.folder / f"{file}.pem"
        new = path.with_suffix(".new")
        new.write_bytes(certificate + private_pem(key))
        new.rename(path)
        return path, path

    def expires(self, file: str) -> float:
        """Returns when the certificate expires, in seconds since 1970."""
        pem = (self.folder / f"{file}.pem").read_bytes()
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()

    def serial(self, file: str) -> str:
        """Returns the serial number as Python's ssl displays it."""
        found = x509.load_pem_x509_certificate(
            (self.folder / f"{file}.pem").read_bytes()
        ).serial_number
        return f"{found:X}".zfill(2 * ((found.bit_length() + 7) // 8))


class Device:
    """A blocking TLS client that verifies the server; for threads."""

    def __init__(
        self, port: int, keys: Keys, *, source: str = "127.0.0.1", name: str = HOST
    ) -> None:
        context = ssl.create_default_context(cafile=str(keys.ca))
        host = "::1" if ":" in source else "127.0.0.1"
        raw = socket.create_connection((host, port), timeout=20, source_address=(source, 0))
        try:
            self._socket = context.wrap_socket(raw, server_hostname=name)
        except BaseException:
            raw.close()
            raise
        self.serial = (self._socket.getpeercert() or {})["serialNumber"]

    def ask(self, path: str, *headers: str) -> None:
        lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}", "Connection: close", *headers, "", ""]
        self._socket.sendall("\r\n".join(lines).encode())

    def read(self, size: int) -> bytes:
        """Reads this number of bytes, fewer at the end."""
        found = bytearray()
        while len(found) < size and (chunk := self._socket.recv(min(65536, size - len(found)))):
            found += chunk
        return bytes(found)

    def answer(self) -> tuple[int, bytes]:
        """Returns status and body of an answer that ends with the connection."""
        head, _, body = self.read(1 << 30).partition(b"\r\n\r\n")
        self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        self._socket.close()


def fetch(
    port: int, keys: Keys, path: str, *headers: str, source: str = "127.0.0.1"
) -> tuple[int, bytes]:
    device = Device(port, keys, source=source)
    device.ask(path, *headers)
    return device.answer()


@asynccontextmanager
async def listening(site: BoundedSite, **layers: Any) -> AsyncIterator[int]:
    """Opens our listener on a free port, as the server's start does."""
    ports = await listen(["tcp:0:interface=127.0.0.1"], site, reactor, **layers)
    try:
        yield port_number(ports[0])
    finally:
        for port in ports:
            await maybeDeferred(port.stopListening)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Ours is ``delta.pem``; haproxy has a wildcard certificate in ``haproxy.pem``."""
    made = Keys(tmp_path)
    made.issue("delta", HOST)
    made.issue("haproxy", "*.example.com")
    return made


@contextmanager
def proxied(
    kind: str,
    keys: Keys,
    backend: int,
    *,
    timeout: str = "63s",
    replace: tuple[str, str] = ("", ""),
) -> Iterator[int]:
    """Runs haproxy with an overlay before ``backend``; yields the port that replaces 443."""
    port, inner = free_port(), free_port()
    config = haproxy.overlaid(
        kind, haproxy.openbalena(keys.folder / "haproxy.pem", port, inner, timeout=timeout)
    )
    assert replace[0] in config
    with haproxy.running(
        config.replace(*replace), keys.folder, port, {"OBDELTA_ADDRESS": f"127.0.0.1:{backend}"}
    ):
        yield port


PROXIES = TrustedProxies(PRIVATE_NETWORKS)


def passed_through(
    keys: Keys,
    *,
    proxies: TrustedProxies = PROXIES,
    connections: Limit | None = None,
    file: Path | None = None,
) -> Any:
    """Yields our server, set up for pass-through: it reads the PROXY protocol, then TLS."""
    certificates = Certificates([(keys.folder / "delta.pem",) * 2], reactor.seconds)
    site = BoundedSite(
        Pages(ForwardedClients(None), file), reactor=reactor, connections=connections
    )
    return listening(site, certificates=certificates, proxies=proxies)
