"""All HTTP endpoints under generated requests, well-formed and not: there is always an answer,
never a 500, and nothing in the log.
"""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.layout_server import server_with_tokens
from tests.support.random_requests import HEADERS, ISSUER, METHODS, PATHS, QUERIES, TOKENS
from tests.support.server import RunningServer

ANSWER_SECONDS = 20.0
EXPECTED = {
    200,
    206,
    300,
    304,
    400,
    401,
    403,
    404,
    405,
    413,
    414,
    416,
    417,
    422,
    429,
    431,
    501,
    505,
}
"""504 from the API too, while a build runs."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("server")
    with server_with_tokens(directory, pair, ISSUER, request_timeout="2") as running:
        yield running
        assert running.process.poll() is None
        for trouble in (
            "Traceback",
            "unexpected error",
            "Unhandled",
            "a response was cut",
            "status=500",
        ):
            assert trouble not in running.log


MANY = settings(
    max_examples=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def is_complete(answer: bytes | bytearray) -> bool:
    """Returns whether the answer is complete: the server gives a refused client two seconds to
    read it.
    """
    head, blank, body = bytes(answer).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
    return bool(blank) and length is not None and len(body) >= int(length[1])


def exchange(
    server: RunningServer, request: bytes, *, port: int | None = None, leave: bool = False
) -> bytes:
    """Returns the answer, up to its length or the end of the connection; a time-out fails the
    test.
    """
    with socket.create_connection(
        ("127.0.0.1", port or server.port), timeout=ANSWER_SECONDS
    ) as client:
        found = bytearray()
        try:
            client.sendall(request)
            if leave:
                # This ends requests that wait for more bytes. The server does not parse bytes
                # after it, so it gets a moment to read them.
                select.select([client], [], [], 0.01)
                client.shutdown(socket.SHUT_WR)
            while not is_complete(found) and (chunk := client.recv(65536)):
                found += chunk
        except ConnectionError:
            pass  # the end, told by a reset
        return bytes(found)


def check(answer: bytes, method: str, path: str) -> None:
    """Checks that the status is one of ours, and that the body fits it."""
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in EXPECTED or (status == 504 and path.startswith(("/api/", "/v2"))), head
    assert b"Unknown Status" not in head
    assert b"Traceback" not in answer
    if status >= 400 and method == "GET" and path.startswith("/v2/") and body:
        (error,) = json.loads(body)["errors"]
        assert set(error) == {"code", "message", "detail"} and "\n" not in error["message"]
    elif status >= 400 and body:
        assert body.count(b"\n") <= 1 and len(body) < 4096


@given(
    method=METHODS,
    path=PATHS,
    query=QUERIES,
    headers=HEADERS,
    allowed=st.booleans(),
    operators=st.booleans(),
)
@example("GET", "/api/v3/delta", "?src=x&dest=x&wait=true", [], True, False)
@example("GET", "/v2/%0a", "", [], True, False)
@example("OPTIONS", "*", "", [], True, False)
@MANY
def test_random_well_formed_requests_cause_no_server_error(
    server: RunningServer,
    method: str,
    path: str,
    query: str,
    headers: list[str],
    allowed: bool,
    operators: bool,
) -> None:
    lines = [
        f"{method} {path}{query.replace('{host}', server.host)} HTTP/1.1",
        "Connection: close",
        *headers,
    ]
    if allowed:
        lines.append(f"Authorization: Bearer {TOKENS[0]}")
    request = "\r\n".join(
        [*lines, f"Host: {'localhost' if operators else 'delta.example.com'}", "", ""]
    ).encode("latin-1")
    port = int(server.operator_url.rpartition(":")[2]) if operators else None
    answer = exchange(server, request, port=port)
    assert answer, "no answer at all"
    check(answer, method, "" if operators else path)


BEGINNINGS = [b"GET /v2/ HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n", b"POST / HTTP/1.1\r\n"]
FRAMINGS = [
    b"Content-Length: -1",
    b"Content-Length: 1, 2",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Transfer-Encoding: x",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    b"Transfer-Encoding: chunked",
    b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 2",
    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 2",
]
HARDLY_HTTP = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.sampled_from(BEGINNINGS), st.binary(max_size=80)).map(
        lambda parts: b"".join(parts) + b"\r\n\r\n"
    ),
    st.sampled_from(FRAMINGS).map(
        lambda one: b"POST /api/v3/delta HTTP/1.1\r\nHost: x\r\n" + one + b"\r\n\r\nzz\r\n\r\n"
    ),
)


@given(request=HARDLY_HTTP)
@MANY
def test_random_bytes_cause_no_server_error(server: RunningServer, request: bytes) -> None:
    """The request is refused, or dropped silently; it is never a fault of ours, and never waits
    for a time-out.
    """
    answer = exchange(server, request, leave=True)
    if answer:
        assert answer.startswith(b"HTTP/1.")
        assert int(answer.split(None, 2)[1]) in EXPECTED


def test_every_endpoint_still_works_afterwards(server: RunningServer, tmp_path: Path) -> None:
    base, target = (f"{server.host}/{name}" for name in (BASE_REPOSITORY, TARGET_REPOSITORY))
    lines = [
        f"GET /api/v3/delta?src={base}&dest={target}&wait=true HTTP/1.1",
        "Host: x",
        "Connection: close",
    ]
    answer = exchange(
        server, "\r\n".join([*lines, f"Authorization: Bearer {TOKENS[0]}", "", ""]).encode()
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"delta-" in answer
