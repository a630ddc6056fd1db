"""The requests of engines and the answers of a registry, through the real server with one process
and with several.

The requests are those of both engine generations (header by header, as measured), and Debian's
docker-registry answers them. A double replaces the registry only where it must misbehave.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.images import push
from obdelta.oci.manifest import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.odd_registry import Handler, OddRegistry, digest_of, odd_registry
from tests.support.registry import running_registry
from tests.support.server import RunningServer, running_server

ACCEPT = (
    DOCKER_MANIFEST,
    DOCKER_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/json",
)


@dataclass(frozen=True)
class EngineGeneration:
    """The requests of a generation of balena-engine, and the type of a delta's manifest for it."""

    user_agent: str
    blob_encoding: str
    delta_type: str


ENGINES = {
    "20": EngineGeneration(
        "balenaEngine/20.10.44 go/go1.19 git-commit/abc kernel/5.15 os/linux arch/arm64",
        "identity",
        DOCKER_MANIFEST,
    ),
    "25": EngineGeneration(
        "balenaEngine/25.0.14 go/go1.24 git-commit/abc kernel/6.6 os/linux arch/arm64",
        "gzip",
        OCI_MANIFEST,
    ),
    "25 of a word": EngineGeneration(
        "balenaEngine/dev go/go1.24 os/linux arch/amd64 UpstreamClient(x)",
        "gzip",
        DOCKER_MANIFEST,
    ),
}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def send(url: str, method: str, path: str, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """Sends one request on a separate connection, with exactly these header lines and ``Host``."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(pair.base, running.url, BASE_REPOSITORY)
        push(pair.target, running.url, TARGET_REPOSITORY)
        yield running.url


@pytest.fixture(scope="module", params=["1", "2"])
def server(
    request: pytest.FixtureRequest, registry: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("server") / "state"
    with running_server(state, upstream=registry, processes=request.param) as running:
        yield running


def decoded(reply: Reply) -> bytes:
    """Returns the content of a document, as engines read a body that they requested in gzip."""
    encoding = reply.headers.get("content-encoding")
    assert encoding in (None, "gzip")
    return reply.body if encoding is None else gzip.decompress(reply.body)


def pull(
    server: RunningServer,
    repository: str,
    tag: str,
    engine: EngineGeneration,
    seed: int,
    manifest_type: str = DOCKER_MANIFEST,
) -> list[bytes]:
    """An engine's pull, request by request; returns the manifest, the config and the layers."""
    agent = ("User-Agent", engine.user_agent)
    accept = [
        ("Accept", media_type) for media_type in random.Random(seed).sample(ACCEPT, len(ACCEPT))
    ]
    compressed = ("Accept-Encoding", "gzip")
    assert send(server.url, "GET", "/v2/", [agent, compressed]).status == 200
    manifests = f"/v2/{repository}/manifests"
    head = send(server.url, "HEAD", f"{manifests}/{tag}", [agent, *accept])
    assert (head.status, head.headers["content-type"]) == (200, manifest_type)
    digest = head.headers["docker-content-digest"]
    reply = send(server.url, "GET", f"{manifests}/{digest}", [agent, *accept, compressed])
    assert (reply.status, reply.headers["content-type"]) == (200, manifest_type)
    manifest = decoded(reply)
    assert digest_of(manifest) == digest and int(head.headers["content-length"]) == len(manifest)
    found = [manifest]
    value = json.loads(manifest)
    for part in (value["config"], *value["layers"]):
        path = f"/v2/{repository}/blobs/{part['digest']}"
        blob = send(server.url, "GET", path, [agent, ("Accept-Encoding", engine.blob_encoding)])
        content = blob.body
        if part is value["config"] and engine.blob_encoding == "gzip":
            content = decoded(blob)
        else:
            assert "content-encoding" not in blob.headers
        assert (blob.status, digest_of(content)) == (200, part["digest"])
        # A dropped connection is resumed without an Accept-Encoding.
        rest = send(server.url, "GET", path, [agent, ("Range", "bytes=7-")])
        assert (rest.status, rest.body) == (206, content[7:])
        assert rest.headers["content-range"] == f"bytes 7-{part['size'] - 1}/{part['size']}"
        found.append(content)
    return found


@pytest.mark.parametrize("generation", ENGINES)
def test_the_requests_of_both_engine_generations(
    server: RunningServer, pair: Pair, generation: str
) -> None:
    engine, host = ENGINES[generation], server.host
    for seed in (1, 2):
        manifest, config, *_ = pull(server, TARGET_REPOSITORY, "latest", engine, seed)
        assert (manifest, config) == (pair.target.manifest, pair.target.config)
    path = f"/api/v3/delta?src={host}/{BASE_REPOSITORY}&dest={host}/{TARGET_REPOSITORY}"
    agent = [("User-Agent", "Supervisor/17.0.0 (Linux; balenaOS 8.0.2; prod)")]
    name = json.loads(send(server.url, "GET", path, agent).body)["name"]
    tag = name.rpartition(":")[2]
    _, config, *layers = pull(server, TARGET_REPOSITORY, tag, engine, 3, engine.delta_type)
    assert (
        json.loads(config)["config"]["Labels"]["io.resin.delta.config"]
        == pair.target.config.decode()
    )
    assert len(layers) == len(pair.target.layers)


def test_all_accept_lines_reach_the_registry(tmp_path: Path) -> None:
    """Distribution 2.8 gives schema 1 to clients that accept none of the newer types, and engines
    take that for the image.
    """
    with (
        odd_registry() as registry,
        running_server(tmp_path / "state", upstream=registry.url, processes="2") as server,
    ):
        digest = registry.put("v2/app", b"{}", [])
        for seed, (method, reference) in enumerate(
            [("HEAD", "latest"), ("GET", digest), ("GET", "latest")]
        ):
            order = random.Random(seed).sample(ACCEPT, len(ACCEPT))
            accept = [("Accept", media_type) for media_type in order]
            assert (
                send(server.url, method, f"/v2/v2/app/manifests/{reference}", accept).status == 200
            )
            assert registry.seen[-1].headers["accept"] == order


def test_pushes_and_other_methods(server: RunningServer, registry: str) -> None:
    source = f"docker://{urlsplit(registry).netloc}/{TARGET_REPOSITORY}:latest"
    for repository in (
        TARGET_REPOSITORY,
        "v2/" + "e" * 32,
    ):  # one repository has all blobs, one has none
        done = subprocess.run(
            [
                "skopeo",
                "copy",
                "-q",
                "--src-tls-verify=false",
                "--dest-tls-verify=false",
                source,
                f"docker://{server.host}/{repository}:pushed",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0 and "served here" in done.stderr, done.stderr
    path = f"/v2/{TARGET_REPOSITORY}/manifests/pushed"
    for length in ("5", "10000", "99999999999", "9" * 25):
        refused = send(server.url, "PUT", path, [("Content-Length", length)])
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert json.loads(refused.body)["errors"][0]["code"] == "UNSUPPORTED"
    chunked = send(
        server.url,
        "PATCH",
        f"/v2/{TARGET_REPOSITORY}/blobs/uploads/x",
        [("Transfer-Encoding", "chunked")],
    )
    assert chunked.status == 405
    assert send(server.url, "OPTIONS", "*").status == 200  # Twisted's own answer, without a path
    for target in ("/v2/", "/api/v3/delta"):
        options = send(server.url, "OPTIONS", target)
        assert (options.status, options.headers["allow"], options.body) == (
            200,
            "GET, HEAD, OPTIONS",
            b"",
        )
    assert send(registry, "GET", path).status == 404


def test_absolute_targets_and_odd_ranges(server: RunningServer, pair: Pair) -> None:
    blob = pair.target.layers[0]
    path, content = f"/v2/{TARGET_REPOSITORY}/blobs/{blob.digest}", blob.path.read_bytes()
    assert send(server.url, "GET", f"http://elsewhere.example.com{path}").body == content
    for value, status, body in (
        ("bytes=0-4,10-14", 200, content),
        ("bytes=0-0, -1", 200, content),
        ("BYTES=0-4", 206, content[:5]),
        ("bytes=-5", 206, content[-5:]),
        ("lines=0-4", 200, content),
    ):
        reply = send(server.url, "GET", path, [("Range", value)])
        assert (reply.status, reply.body) == (status, body), value
    twice = send(server.url, "GET", path, [("Range", "bytes=0-4"), ("Range", "bytes=5-9")])
    assert (twice.status, twice.body) == (200, content)
    refused = send(server.url, "GET", "/v2/_catalog")
    assert (
        refused.status == 400 and b"the catalog of all repositories is not served" in refused.body
    )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("Host: other", "several host headers"),
        ("Authorization: Bearer a\r\nAuthorization: Bearer b", "several authorization headers"),
        ("X-Folded: a\r\n b", "may not be folded"),
    ],
)
def test_refusals_are_the_same_in_all_processes(server: RunningServer, line: str, why: str) -> None:
    for _ in range(4):
        name, _, value = line.partition(": ")
        connection = http.client.HTTPConnection(server.host, timeout=30)
        connection.putrequest("GET", "/v2/")
        connection._buffer.append(f"{name}: {value}".encode())  # type: ignore[attr-defined] # as it stands: not checked
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 400 and why in json.loads(answer.read())["errors"][0]["message"]
        connection.close()


@pytest.fixture(params=["1", "2"])
def odd(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[OddRegistry, RunningServer]]:
    with (
        odd_registry() as registry,
        running_server(
            tmp_path / "state", upstream=registry.url, processes=request.param
        ) as server,
    ):
        yield registry, server


def test_some_queries_and_headers_are_not_sent_to_the_upstream(
    odd: tuple[OddRegistry, RunningServer],
) -> None:
    registry, server = odd

    def answer(request: Handler) -> bool:
        if "/manifests/" in request.path:
            raw = b'{"schemaVersion": 2}'
            request.reply(
                200,
                raw,
                content_type=DOCKER_MANIFEST,
                docker_content_digest=digest_of(raw),
                x_kept="1",
                x_hop="1",
                x_other="1",
                Connection="keep-alive, X-Hop , x-other",
            )
        else:
            request.reply(200, b'{"name": "v2/app", "tags": []}', content_type="application/json")
        return True

    registry.odd = answer
    for number in range(20):
        assert (
            send(server.url, "GET", f"/v2/v2/app/manifests/latest?odd={number}&n=5").status == 200
        )
    assert {seen.path for seen in registry.seen} == {"/v2/v2/app/manifests/latest"}
    reply = send(server.url, "GET", "/v2/v2/app/manifests/latest")
    assert reply.headers["x-kept"] == "1" and not {"x-hop", "x-other"} & reply.headers.keys()
    registry.seen.clear()
    for query in ("?n=5&last=1.0&x=y", "?last=1.0&n=5", "?x=y", ""):
        assert send(server.url, "GET", f"/v2/v2/app/tags/list{query}").status == 200
    assert [seen.path.partition("?")[2] for seen in registry.seen] == [
        "n=5&last=1.0",
        "n=5&last=1.0",
        "",
        "",
    ]
    for query in ("?n=many", "?n=5&n=6", "?n=-1"):
        assert send(server.url, "GET", f"/v2/v2/app/tags/list{query}").status == 400
