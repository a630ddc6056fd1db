"""Attacks on the real server: killed workers, a stop during a build, odd images, odd requests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import treq
from twisted.internet.task import deferLater

from bench.images import (
    Compression,
    Format,
    Image,
    Layer,
    file,
    make_image,
    make_index,
    make_layer,
    push,
)
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device, Update
from obdelta.oci import Reference
from obdelta.oci.manifest import DOCKER_MANIFEST
from tests.server.test_v3 import ask, get
from tests.support.hostile import (
    HostileUpstream,
    dropping,
    hanging,
    hostile_upstream,
    ranged,
    reactor,
    response,
)
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until
from tests.support.registry import running_registry
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


def update(server: RunningServer, work: Path, base: str = BASE, target: str = TARGET) -> Update:
    """Updates like a device; raises unless every diff_id and the image ID are right."""
    work.mkdir()
    http = Http(timeout=30)
    device = Device(http, Engine(http, registry=server.url), server.url)
    base_name, target_name = names(server, base, target)
    return device.update(
        device.load_base(Reference.parse(base_name), work), base_name, target_name, work
    )


def workers(server: RunningServer) -> list[int]:
    """The server's worker processes."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text(
        "ascii"
    )
    return [int(pid) for pid in children.split()]


def kill_writers(server: RunningServer, suffix: str) -> list[int]:
    """Kills the workers that have a file of this name open."""
    killed = []
    for pid in workers(server):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if any(link.readlink().suffix == suffix for link in Path(f"/proc/{pid}/fd").iterdir()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return killed


def files_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file()]


# -- workers and stops -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".delta"])
def test_a_killed_worker_costs_one_attempt(
    server: RunningServer, tmp_path: Path, suffix: str
) -> None:
    """Kills the worker while it inflates layers, or while it builds the delta. The build's second
    attempt answers all waiting clients.
    """
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(ask, server, *names(server))
        killed: list[int] = []
        while not pending.done():
            killed = killed or kill_writers(server, suffix)
        status, _ = pending.result()
    assert killed
    assert status == 200
    (retried,) = [line for line in server.log.splitlines() if "is retried once" in line]
    assert "signal 9" in retried
    # The other form of the delta is built after it.
    until("nothing is left", lambda: not files_in(server.state_dir / "tmp"), 60)
    assert update(server, tmp_path / "device").is_delta


async def behave(upstream: HostileUpstream, pair: Pair) -> None:
    """Answers as a good registry does."""
    for repository, image in ((BASE, pair.base), (TARGET, pair.target)):
        for selector in ("latest", image.digest):
            upstream.script(
                f"/v2/{repository}/manifests/{selector}",
                response(200, image.manifest, content_type=DOCKER_MANIFEST),
            )
        upstream.script(f"/v2/{repository}/blobs/{image.image_id}", ranged(image.config))
        for layer in image.layers:
            upstream.script(
                f"/v2/{repository}/blobs/{layer.digest}", ranged(layer.path.read_bytes())
            )


def test_a_second_server_on_the_same_state_does_not_start_and_changes_nothing(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    growing = server.state_dir / "tmp" / "of-a-build"
    growing.touch()
    with (
        pytest.raises(AssertionError, match="the state directory is in use"),
        running_server(server.state_dir, upstream=f"oci:{pair.root}"),
    ):
        pass
    assert growing.exists()
    growing.unlink()
    assert update(server, tmp_path / "device").is_delta


@pytest_twisted.ensureDeferred
async def test_sigterm_in_mid_download_ends_it_at_once_with_status_0(
    pair: Pair, tmp_path: Path
) -> None:
    async with hostile_upstream() as upstream:
        await behave(upstream, pair)
        slow = f"/v2/{TARGET}/blobs/{pair.target.layers[2].digest}"
        upstream.script(slow, hanging(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nsome"))
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            src, dest = names(server)
            pending = treq.get(f"{server.url}/api/v3/delta?src={src}&dest={dest}", persistent=False)
            pending.addBoth(lambda _: None)  # it may be cut or be told
            while not upstream.requests_to(slow):
                await deferLater(reactor, 0.02, lambda: None)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert files_in(tmp_path / "state" / "tmp") == []
        await pending


@pytest_twisted.ensureDeferred
async def test_an_import_without_waiting_clients_is_cancelled(pair: Pair, tmp_path: Path) -> None:
    """One layer of a build hangs and another one is unavailable: nothing continues in the
    background for ever.
    """
    async with hostile_upstream() as upstream:
        await behave(upstream, pair)
        slow = f"/v2/{TARGET}/blobs/{pair.target.layers[1].digest}"
        upstream.script(
            slow,
            hanging(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\nsome" % pair.target.layers[1].size
            ),
        )
        upstream.script(f"/v2/{TARGET}/blobs/{pair.target.layers[2].digest}", response(403, b"{}"))
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            src, dest = names(server)
            answer = await treq.get(
                f"{server.url}/api/v3/delta?src={src}&dest={dest}", persistent=False
            )
            assert answer.code == 403
            await answer.content()
            for connection in [
                one for one in upstream.connections if one.request and one.request.path == slow
            ]:
                await connection.gone
            for _ in range(500):
                if not files_in(server.state_dir / "tmp"):
                    break
                await deferLater(reactor, 0.02, lambda: None)
            assert files_in(server.state_dir / "tmp") == []


@pytest_twisted.ensureDeferred
async def test_a_cut_download_is_resumed_at_its_offset(pair: Pair, tmp_path: Path) -> None:
    layer = max(pair.target.layers[1:4], key=lambda layer: layer.size)
    body = layer.path.read_bytes()
    path = f"/v2/{TARGET}/blobs/{layer.digest}"
    async with hostile_upstream() as upstream:
        await behave(upstream, pair)
        upstream.script(path, dropping(body, len(body) // 2), ranged(body, at=100), ranged(body))
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            src, dest = names(server)
            answer = await treq.get(
                f"{server.url}/api/v3/delta?src={src}&dest={dest}", persistent=False
            )
            assert b":delta-" in await answer.content()
        ranges = [request.header("range") for request in upstream.requests_to(path)]
        assert ranges == [None, f"bytes={len(body) // 2}-", f"bytes={len(body) // 2 + 100}-"]


@pytest_twisted.ensureDeferred
async def test_a_size_of_thousands_of_digits_is_the_upstreams_fault(
    pair: Pair, tmp_path: Path
) -> None:
    path = f"/v2/{TARGET}/blobs/{pair.target.layers[0].digest}"
    async with hostile_upstream() as upstream:
        upstream.script(path, response(200, content_length="9" * 5000))
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            answer = await treq.get(server.url + path, persistent=False)
            assert answer.code == 502
            await answer.content()
            assert "Traceback" not in server.log


@pytest_twisted.ensureDeferred
async def test_false_sizes_do_not_change_the_savings(pair: Pair, tmp_path: Path) -> None:
    """The digest decides, so such images get deltas. Figures count the blobs' real sizes; sums of
    declared sizes would not fit into the catalogue.
    """

    def lying(number: int) -> bytes:
        value = json.loads(pair.target.manifest)
        value["layers"][number]["size"] = (1 << 62) - 1
        return json.dumps(value).encode()

    async with hostile_upstream() as upstream:
        await behave(upstream, pair)
        for name, raw in (("unfetched", lying(4)), ("cached", lying(1))):
            for selector in (name, f"sha256:{hashlib.sha256(raw).hexdigest()}"):
                upstream.script(
                    f"/v2/{TARGET}/manifests/{selector}",
                    response(200, raw, content_type=DOCKER_MANIFEST),
                )
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            src, dest = names(server)

            async def fetch(path: str) -> tuple[int, dict[str, Any]]:
                answer = await treq.get(path, persistent=False)
                content = await answer.content()
                return answer.code, json.loads(content) if answer.code == 200 else {}

            for kind in ("latest", "unfetched", "cached"):
                pending, received = await fetch(
                    f"{server.url}/api/v3/delta?src={src}&dest={dest}:{kind}"
                )
                assert pending == 200, kind
                for _ in range(4):
                    tag = received["name"].rpartition(":")[2]
                    assert (await fetch(f"{server.url}/v2/{TARGET}/manifests/{tag}"))[0] == 200
            for kind in ("latest", "cached", "unfetched"):
                where = f"{server.url}/api/v2/delta?src={src}&dest={dest}:{kind}"
                answer = await treq.get(where, persistent=False, allow_redirects=False)
                await answer.content()
                assert answer.code == 300, kind
            _, status_page = await fetch(f"{server.operator_url}/api/v1/status")
            assert status_page["served"]["full_bytes"] < 1 << 30
            assert "Traceback" not in server.log


@pytest_twisted.ensureDeferred
async def test_a_query_string_reaches_the_upstream(pair: Pair, tmp_path: Path) -> None:
    path = f"/v2/{TARGET}/tags/list"
    async with hostile_upstream() as upstream:
        upstream.script(path, response(200, b'{"tags":["b"]}'))
        with running_server(tmp_path / "state", upstream=upstream.url) as server:
            answer = await treq.get(f"{server.url}{path}?n=1&last=a%2Fb", persistent=False)
            assert await answer.content() == b'{"tags":["b"]}'
        assert [request.path for request in upstream.seen] == [f"{path}?n=1&last=a%2Fb"]


# -- the registry API -------------------------------------------------------------------------


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
    with socket.create_connection(("127.0.0.1", reading.port), timeout=10) as connection:
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
    with socket.create_connection(("127.0.0.1", reading.port), timeout=10) as connection:
        connection.sendall(request_bytes)
        assert int(connection.recv(65536).split()[1]) == status
    assert "Traceback" not in reading.log


# -- images ------------------------------------------------------------------------------------


class Shelf:
    """Makes images for one ``oci:`` upstream."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0

    def layer(self, *contents: bytes, compression: Compression = "gzip") -> Layer:
        entries = [file(f"f{number}", content) for number, content in enumerate(contents)]
        return make_layer(entries, self.root / ".blobs", compression=compression)

    def image(
        self, layers: Sequence[Layer], *, format: Format = "docker", label: str = ""
    ) -> tuple[str, Image]:
        self._number += 1
        repository = f"v2/{self._number:032x}"
        return repository, make_image(
            layers, self.root / repository, format=format, labels={"label": label}
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    (root / ".blobs").mkdir()
    return Shelf(root)


@pytest.fixture(scope="module")
def shelf_server(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(
        tmp_path_factory.mktemp("run") / "state", upstream=f"oci:{shelf.root}"
    ) as running:
        yield running


def noise(seed: str, size: int = 50_000) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def edited(content: bytes) -> bytes:
    return content[:1000] + b"edited" + content[1000:]


@pytest.mark.parametrize("format", ["docker", "oci"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_all_manifest_formats_are_read(
    shelf: Shelf,
    shelf_server: RunningServer,
    tmp_path: Path,
    format: Format,
    compression: Compression,
) -> None:
    if format == "docker" and compression != "gzip":
        format = "oci"  # Docker's schema has a name for gzip only
    content = noise(f"{format} {compression}")
    base, _ = shelf.image([shelf.layer(content, compression=compression)], format=format)
    target, _ = shelf.image(
        [
            shelf.layer(edited(content), compression=compression),
            shelf.layer(b"more", compression=compression),
        ],
        format=format,
    )
    done = update(shelf_server, tmp_path / "device", base, target)
    assert done.is_delta
    assert done.pulled_bytes < 10_000


def test_an_index_with_one_platform_is_that_image(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    content = noise("index")
    base, _ = shelf.image([shelf.layer(content)])
    target, image = shelf.image([shelf.layer(edited(content))])
    make_index([(image, {"os": "linux", "architecture": "arm64"})], shelf.root / target)
    status, body = ask(shelf_server, *names(shelf_server, base, target))
    assert status == 200
    name = Reference.parse(json.loads(body)["name"])
    assert name.tag is not None
    assert name.tag.startswith("delta-")
    assert (
        Engine(Http(), registry=shelf_server.url)
        .pull(name)
        .config.value["config"]["Labels"]["io.resin.delta.config"]
        .encode()
        == image.config
    )


def test_layers_that_repeat_and_layers_that_are_empty(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    content = noise("repeat")
    one, other, empty = shelf.layer(content), shelf.layer(edited(content), b"x"), shelf.layer()
    base, _ = shelf.image([one, empty, one, empty])
    target, _ = shelf.image([one, other, empty, other, one, empty, one])
    done = update(shelf_server, tmp_path / "device", base, target)
    assert done.is_delta
    assert done.pulled_bytes < 10_000


def test_a_delta_without_common_layers_is_too_large(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    base, _ = shelf.image([shelf.layer(noise("this"))])
    target, _ = shelf.image([shelf.layer(noise("that"))])
    assert not update(shelf_server, tmp_path / "device", base, target).is_delta
    assert "category=not-worth" in shelf_server.log


def test_another_config_on_the_same_layers_fetches_nothing(shelf: Shelf, tmp_path: Path) -> None:
    layers = [shelf.layer(noise("config")), shelf.layer(b"small")]
    base, _ = shelf.image(layers, label="one")
    target, _ = shelf.image(layers, label="two")
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}") as server:
        assert not update(server, tmp_path / "device", base, target).is_delta
        assert files_in(server.state_dir / "layers") == []


def test_sixty_layers(shelf: Shelf, shelf_server: RunningServer, tmp_path: Path) -> None:
    contents = [noise(f"layer {number}", 5_000) for number in range(60)]
    base, _ = shelf.image([shelf.layer(content) for content in contents])
    target, _ = shelf.image(
        [shelf.layer(edited(content) if n % 3 else content) for n, content in enumerate(contents)]
    )
    assert update(shelf_server, tmp_path / "device", base, target).is_delta


def test_many_small_bombs_are_limited_together(shelf: Shelf, shelf_server: RunningServer) -> None:
    """Each of these layers may inflate to its size; an image of hundreds would fill the disk at
    the cost of a few MB.
    """
    base, _ = shelf.image([shelf.layer(noise("bombs"))])
    target, _ = shelf.image([shelf.layer(bytes([number]) + bytes(24 << 20)) for number in range(5)])
    status, body = ask(shelf_server, *names(shelf_server, base, target))
    assert (status, json.loads(body)["name"]) == (200, names(shelf_server, base, target)[1])
    assert "bytes together" in shelf_server.log
    # Other forms of earlier tests' deltas may still be built.
    until("nothing is left", lambda: not files_in(shelf_server.state_dir / "tmp"), 60)


def test_an_image_larger_than_max_image(shelf: Shelf, tmp_path: Path) -> None:
    contents = [noise(f"part {number}") for number in range(8)]
    base, _ = shelf.image([shelf.layer(content) for content in contents])
    target, _ = shelf.image([shelf.layer(edited(content)) for content in contents])
    for most, too_large in (("128 KiB", True), ("1 MiB", False)):
        with running_server(
            tmp_path / most[:3], upstream=f"oci:{shelf.root}", max_image=most
        ) as server:
            assert ask(server, *names(server, base, target))[0] == 200
            assert ("category=image-unusable" in server.log) == too_large


def test_equal_contents_in_other_repositories_share_a_delta_but_no_access(
    shelf: Shelf, tmp_path: Path
) -> None:
    content = noise("twice")
    layers = [shelf.layer(content)], [shelf.layer(edited(content))]
    (base, _), (target, _) = (shelf.image(one) for one in layers)
    (other_base, _), (other_target, other_image) = (shelf.image(one) for one in layers)
    stranger, strange_image = shelf.image(layers[1])
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}") as server:
        port = server.port
        first = update(server, tmp_path / "first", base, target)
        tag = Reference.parse(first.name).tag
        for repository, own in ((other_target, other_image), (stranger, strange_image)):
            # No byte of the delta: the repository's own image, as for any unknown delta tag.
            status, _, body = get(f"{server.url}/v2/{repository}/manifests/{tag}")
            assert (status, hashlib.sha256(body).hexdigest()) == (200, own.digest.hex)
        second = update(server, tmp_path / "second", other_base, other_target)
        assert Reference.parse(second.name) == Reference(server.host, other_target, tag)
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}", port=port) as server:
        digests = set()
        for repository in (target, other_target):
            image = Engine(Http(), registry=server.url).pull(
                Reference(server.host, repository, tag)
            )
            digests.add(image.manifest.digest)
            assert (
                get(f"{server.url}/v2/{repository}/blobs/{image.manifest.layers[0].digest}")[0]
                == 200
            )
            assert (
                get(f"{server.url}/v2/{stranger}/blobs/{image.manifest.layers[0].digest}")[0] == 404
            )
        assert len(digests) == 1
        assert get(f"{server.url}/v2/{stranger}/manifests/{digests.pop()}")[0] == 404
        assert server.log.count("form=gzip outcome=ready") == 1


def test_a_config_that_claims_a_foreign_layer_gets_no_bytes_of_it(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    """The secret's diff_id is known and its layer cached. A client that claims this diff_id for
    its own blob gets an error, not bytes.
    """
    secret, own = shelf.layer(noise("secret")), shelf.layer(noise("own"))
    base, _ = shelf.image([secret])
    target, _ = shelf.image([shelf.layer(edited(noise("secret")))])
    assert update(shelf_server, tmp_path / "device", base, target).is_delta
    rootfs = {"type": "layers", "diff_ids": [str(secret.diff_id)]}
    claimed = f"v2/{'e' * 32}"
    make_image([own], shelf.root / claimed, config={"rootfs": rootfs})
    status, body = ask(shelf_server, *names(shelf_server, claimed, target))
    assert (status, json.loads(body)["name"]) == (200, names(shelf_server, claimed, target)[1])
    assert "its blob inflates to" in shelf_server.log


def test_a_manifest_that_names_a_foreign_blob_gets_no_bytes_of_it(
    pair: Pair, shelf: Shelf, tmp_path: Path
) -> None:
    """A registry does not check that a repository has a blob when its manifest gives URLs for it.

    A client that knows only a digest could otherwise read cached bytes of another fleet, as
    literals of a delta between its own images.
    """
    own = noise("own", 200_000)
    secret = pair.target.layers[2]
    with running_registry(tmp_path / "registry") as registry:
        push(pair.base, registry.url, BASE)
        push(pair.target, registry.url, TARGET)
        base, before = shelf.image([shelf.layer(own)])
        target, after = shelf.image([secret, shelf.layer(edited(own))])
        value = json.loads(after.manifest)
        value["layers"][0]["urls"] = ["http://example.com/"]
        push(before, registry.url, base)
        push(
            replace(after, manifest=json.dumps(value).encode(), layers=after.layers[1:]),
            registry.url,
            target,
        )
        with running_server(
            tmp_path / "state", upstream=registry.url, max_delta_ratio="0.99"
        ) as server:
            assert update(server, tmp_path / "victim").is_delta
            src, dest = names(server, base, target)
            status, body = ask(server, src, dest)
            assert (status, json.loads(body)["name"]) == (
                200,
                dest,
            ), "a full pull, in which the registry refuses the blob"
            assert get(f"{server.url}/v2/{target}/blobs/{secret.digest}")[0] == 404
            # The same for v2: the victim's root filesystem is unpacked, and its layers are known.
            assert (
                get(f"{server.url}/api/v2/delta?src={names(server)[0]}&dest={names(server)[1]}")[0]
                == 300
            )
            _, headers, _ = get(f"{server.url}/api/v2/delta?src={src}&dest={dest}")
            assert headers["location"].endswith("full-pull=yes")
