"""Ranges and files, through a real HTTP connection on loopback."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
import treq
from twisted.internet.defer import maybeDeferred, succeed
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.web.client import ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request
from twisted.web.test.requesthelper import DummyRequest

from obdelta.errors import Denied
from obdelta.net.certificates import Certificates
from obdelta.net.http_server import BoundedSite
from obdelta.net.listen import listen
from obdelta.registry import ProxiedResponse
from obdelta.store.growing_file import GrowingFile
from obdelta.web.devices.responses import (
    Growing,
    Stored,
    send,
    send_proxied,
    send_stored,
    vary_by,
)
from tests.support.tokens import make_certificate, make_key, private_pem
from tests.support.web import reactor, serving

CONTENT = bytes(range(256)) * 4096
ETAG = '"sha256:00"'


LARGE = 32 << 20


class _FileResource(Resource):
    isLeaf = True

    def __init__(self, path: Path, size: int) -> None:
        Resource.__init__(self)
        self._path, self._size = path, size

    def render(self, request: Request) -> int:
        try:
            send_stored(request, Stored.open(self._path, self._size, ETAG, {}))
        except FileNotFoundError:
            request.setResponseCode(404)
            request.finish()
        return NOT_DONE_YET


@pytest.mark.parametrize(
    ("method", "headers", "status", "body", "content_range"),
    [
        ("GET", {}, 200, CONTENT, None),
        ("HEAD", {}, 200, b"", None),
        ("GET", {"Range": "bytes=5-9"}, 206, CONTENT[5:10], f"bytes 5-9/{len(CONTENT)}"),
        (
            "GET",
            {"Range": "bytes=1000000-"},
            206,
            CONTENT[1000000:],
            f"bytes 1000000-{len(CONTENT) - 1}/{len(CONTENT)}",
        ),
        ("HEAD", {"Range": "bytes=5-9"}, 206, b"", f"bytes 5-9/{len(CONTENT)}"),
        ("GET", {"Range": f"bytes={len(CONTENT)}-"}, 416, b"", f"bytes */{len(CONTENT)}"),
        (
            "GET",
            {"Range": "bytes=5-9", "If-Range": ETAG},
            206,
            CONTENT[5:10],
            f"bytes 5-9/{len(CONTENT)}",
        ),
        ("GET", {"Range": "bytes=5-9", "If-Range": '"other"'}, 200, CONTENT, None),
    ],
)
@pytest_twisted.ensureDeferred
async def test_stored_content_is_sent(
    tmp_path: Path,
    method: str,
    headers: dict[str, str],
    status: int,
    body: bytes,
    content_range: str | None,
) -> None:
    path = tmp_path / "blob"
    path.write_bytes(CONTENT)
    async with serving(_FileResource(path, len(CONTENT))) as url:
        response = await treq.request(
            method, url, headers=Headers({k: [v] for k, v in headers.items()}), persistent=False
        )
        assert response.code == status
        assert await response.content() == body
        found = response.headers.getRawHeaders("content-range")
        assert found == (None if content_range is None else [content_range])
        assert response.headers.getRawHeaders("etag") == [ETAG]
        assert response.headers.getRawHeaders("accept-ranges") == ["bytes"]


@pytest_twisted.ensureDeferred
async def test_an_incomplete_file_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(CONTENT[:-1])
    async with serving(_FileResource(path, len(CONTENT))) as url:
        response = await treq.get(url, persistent=False)
        assert response.code == 404
        await response.content()


@pytest_twisted.ensureDeferred
async def test_a_file_truncated_while_it_is_sent_cuts_the_connection(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.touch()
    os.truncate(path, LARGE)
    async with serving(_FileResource(path, LARGE)) as url:
        response = await treq.get(url, persistent=False, unbuffered=True)
        received: list[int] = []

        def some(piece: bytes) -> None:
            if not received:
                os.truncate(path, 1 << 20)
            received.append(len(piece))

        with pytest.raises(ResponseFailed):
            await treq.collect(response, some)
        assert 0 < sum(received) < LARGE


@pytest_twisted.ensureDeferred
async def test_a_second_answer_waits_for_the_first_one_over_tls(tmp_path: Path) -> None:
    """A client that sends two requests at once reads only the first answer: the second one must
    not fill our memory.
    """
    path, key = tmp_path / "blob", make_key("ES256")
    path.touch()
    os.truncate(path, LARGE)
    (tmp_path / "pem").write_bytes(make_certificate(key, "localhost") + private_pem(key))
    channels: list[Any] = []

    class Noting(BoundedSite):
        def buildProtocol(self, addr: Any) -> Any:
            channels.append(super().buildProtocol(addr))  # type: ignore[no-untyped-call] # Twisted's
            return channels[-1]

    site = Noting(cast(Any, _FileResource(path, LARGE)), reactor=reactor)
    certificates = Certificates([(tmp_path / "pem", tmp_path / "pem")], reactor.seconds)
    (port,) = await listen(["tcp:0:interface=127.0.0.1"], site, reactor, certificates=certificates)

    def take_the_first() -> ssl.SSLSocket:
        tls = ssl.create_default_context(cafile=str(tmp_path / "pem"))
        client = tls.wrap_socket(
            socket.create_connection(("127.0.0.1", cast(Any, port.getHost()).port)),
            server_hostname="localhost",
        )
        client.sendall(2 * b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = bytearray()
        while (head := received.find(b"\r\n\r\n")) < 0 or len(received) < head + 4 + LARGE:
            received += client.recv(1 << 18)
        return client

    client = await deferToThread(take_the_first)
    try:
        (channel,) = channels
        while len(channel.requests) != 1 or not channel._waitingForTransport:
            await deferLater(reactor, 0.01)
        below = channel.transport.transport
        assert len(below.dataBuffer) + below._tempDataLen < 1 << 20
    finally:
        client.close()
        await maybeDeferred(port.stopListening)


class Refused:
    """A source of 100 bytes whose work is refused."""

    def __init__(self) -> None:
        self.opened = self.released = 0
        headers = {b"cache-control": b"max-age=31536000"}
        self.body = Growing(self._open, 100, ETAG, headers, release=self._release)

    async def _open(self) -> GrowingFile:
        self.opened += 1
        raise Denied("not this one")

    def _release(self) -> None:
        self.released += 1


@pytest_twisted.ensureDeferred
async def test_a_source_that_fails_before_its_first_byte_leaves_the_request_untouched() -> None:
    source, request = Refused(), DummyRequest([b"blob"])
    with pytest.raises(Denied):
        await send(cast(Request, request), source.body)
    assert (source.opened, source.released) == (1, 1)
    # A device may cache such an answer for ever if it carries the blob's headers.
    assert list(request.responseHeaders.getAllRawHeaders()) == []
    assert request.responseCode is None and not request.written


@pytest_twisted.ensureDeferred
async def test_head_of_a_growing_body_starts_no_work() -> None:
    source, request = Refused(), DummyRequest([b"blob"])
    request.method = b"HEAD"
    await send(cast(Request, request), source.body)
    assert (source.opened, source.released) == (0, 1)
    assert request.responseHeaders.getRawHeaders(b"content-length") == [b"100"]
    assert request.finished == 1 and not request.written


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [(b"range", b"bytes=100-", 416), (b"if-none-match", ETAG.encode(), 304)],
)
@pytest_twisted.ensureDeferred
async def test_an_answer_without_a_body_starts_no_work(
    header: bytes, value: bytes, status: int
) -> None:
    source, request = Refused(), cast(Any, DummyRequest([b"blob"]))
    request.requestHeaders.setRawHeaders(header, [value])
    await send(request, source.body)
    assert (source.opened, source.released) == (0, 1)
    assert request.responseCode == status
    assert request.finished == 1 and not request.written


@pytest_twisted.ensureDeferred
async def test_a_proxied_response_varies_by_the_client_too() -> None:
    """A cache in front would give one engine's manifest to all, if only the upstream's header were
    sent.
    """
    request = cast(Any, DummyRequest([b""]))
    vary_by(request, b"User-Agent")
    headers = Headers({"Vary": ["Accept-Encoding, origin", "User-Agent"]})
    response = ProxiedResponse(200, headers, 0, lambda consumer: succeed(None), lambda: None)
    await send_proxied(request, response)
    assert request.responseHeaders.getRawHeaders(b"vary") == [
        b"User-Agent, Accept-Encoding, origin"
    ]
