"""Odd requests to the real server: of the registry API, of paths, and ambiguous ones."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from obdelta.oci import Reference
from tests.server.test_v3 import ask, get
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server

BASE, TARGET = BASE_REPOSITORY, TARGET_REPOSITORY


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def reading(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server for tests that change nothing."""
    with running_server(
        tmp_path_factory.mktemp("reading") / "state", upstream=f"oci:{pair.root}"
    ) as running:
        yield running


@pytest.fixture
def server(pair: Pair, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}") as running:
        yield running


def names(server: RunningServer, base: str = BASE, target: str = TARGET) -> tuple[str, str]:
    return f"{server.host}/{base}", f"{server.host}/{target}"


def test_a_delta_has_the_same_head_for_get_and_head_and_is_not_sent_twice(
    reading: RunningServer,
) -> None:
    name = Reference.parse(json.loads(ask(reading, *names(reading))[1])["name"])
    manifest = json.loads(get(f"{reading.url}/v2/{TARGET}/manifests/{name.tag}")[2])
    paths = [
        f"manifests/{name.tag}",
        *(f"blobs/{part['digest']}" for part in [manifest["config"], *manifest["layers"]]),
    ]
    for path in paths:
        url = f"{reading.url}/v2/{TARGET}/{path}"
        status, headers, body = get(url)
        head_status, head, nothing = get(url, method="HEAD")
        for either in (headers, head):
            either.pop("date")
            either.pop("x-request-id")
        assert (status, head_status, nothing) == (200, 200, b"")
        assert headers == head
        assert headers["docker-content-digest"] == f"sha256:{hashlib.sha256(body).hexdigest()}"
        assert int(headers["content-length"]) == len(body)
        for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
            for method in ("GET", "HEAD"):
                status, again, nothing = get(url, method, **{"If-None-Match": known})
                assert (status, nothing, again["etag"]) == (304, b"", headers["etag"])
        assert get(url, **{"If-None-Match": '"other"'})[2] == body


def test_a_delta_tag_without_a_base_gives_the_targets_own_manifest(
    reading: RunningServer, pair: Pair
) -> None:
    url = f"{reading.url}/v2/{TARGET}/manifests/delta-{'0' * 32}"
    status, headers, body = get(url)
    assert (status, body, headers["docker-content-digest"]) == (
        200,
        pair.target.manifest,
        str(pair.target.digest),
    )
    assert "User-Agent" in headers["vary"]
    status, headers, _ = get(url, method="HEAD")
    assert (status, headers["docker-content-digest"]) == (200, str(pair.target.digest))
    assert headers["content-length"] == str(len(pair.target.manifest))


def test_manifest_requests_join_the_builds_of_the_api(server: RunningServer) -> None:
    tag = f"delta-{BASE.removeprefix('v2/')}"
    with ThreadPoolExecutor(20) as threads:
        pending = [threads.submit(ask, server, *names(server)) for _ in range(10)]
        pulled = [
            threads.submit(get, f"{server.url}/v2/{TARGET}/manifests/{tag}") for _ in range(10)
        ]
        assert {one.result()[0] for one in pending} == {200}
        assert len({one.result()[2] for one in pulled}) == 1
    assert server.log.count("form=gzip outcome=ready") == 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/v2/{TARGET.replace('/', '%2F')}/manifests/latest", 200),
        (f"/%76%32/{TARGET}/manifests/l%61test", 200),
        (f"/v2/{TARGET}/manifests/latest%00", 400),
        (f"/v2/{TARGET}/manifests/latest%3Fx", 400),
        (f"/v2/{TARGET}/manifests/latest%0d%0aX-Injected:%201", 400),
        (f"/v2/{TARGET}/manifests/%E2%80%AE", 400),
        (f"/v2/{TARGET}//manifests/latest", 400),
        (f"/v2/{TARGET}/./manifests/latest", 400),
        (f"/v2/{TARGET}%2f..%2f{BASE.removeprefix('v2/')}/manifests/latest", 400),
        (f"/v2/{TARGET}/manifests/{'a' * 200}", 400),
        (f"/v2/{'a/' * 200}manifests/latest", 400),
        (f"/v2/{TARGET}/tags/other", 400),
        (f"/v2/{TARGET}/blobs/sha256:{'0' * 63}", 400),
        ("/v2/_catalog", 400),
    ],
)
def test_each_odd_path_has_its_status(reading: RunningServer, path: str, status: int) -> None:
    found, headers, body = get(reading.url + path)
    assert found == status
    assert "x-injected" not in headers
    if status != 200:
        assert len(json.loads(body)["errors"]) == 1


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: %d\r\n\r\n"
        % len(HEALTH),
        (
            b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding:"
            b" chunked\r\n\r\n0\r\n\r\n"
        ),
        (
            b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding:"
            b" identity\r\n\r\n0\r\n\r\n"
        ),
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n",
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello",
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello",
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\n folded: 1\r\nContent-Length : 5\r\n\r\n",
        b"GET /v2/\x00 HTTP/1.1\r\nHost: x\r\nX:\x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_an_ambiguous_request_head_ends_the_connection(reading: RunningServer, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", reading.port), timeout=60) as connection:
        connection.sendall(head + HEALTH)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    assert b"ok\n" not in received, "what came behind it was taken for a request"
    assert received.count(b"HTTP/1.1 2") == 0
    assert get(f"{reading.url}/healthz")[0] == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n" % (b"9" * 5000), 413),
        (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n", 405),
        (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 405),
        (
            b"GET /api/v2/delta?src=%s&dest=%s HTTP/1.1\r\nHost: x\r\nUser-Agent:"
            b" Supervisor/%s.1.1\r\n\r\n" % (BASE.encode(), BASE.encode(), b"9" * 5000),
            300,
        ),
    ],
)
def test_too_large_numbers_and_bodies_are_no_unexpected_errors(
    reading: RunningServer, request_bytes: bytes, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", reading.port), timeout=60) as connection:
        connection.sendall(request_bytes)
        assert int(connection.recv(65536).split()[1]) == status
    assert "Traceback" not in reading.log
