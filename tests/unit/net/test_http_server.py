"""Limits for strangers: sizes and malformed requests, each with the exact answer."""

from __future__ import annotations

import pytest

from tests.support.logs import logged
from tests.support.memory_server import REQUEST, Server


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
