"""A manifest outlives its layers: given up for the quota, they are made again when a device asks,
and streamed meanwhile.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from bench.images import push
from bench.registry import serving
from obdelta.builds.rebuild import HELD_BACK, LOOK_EVERY, Rebuild
from obdelta.device import Device, Engine, Http
from obdelta.errors import DigestMismatch, SizeMismatch
from obdelta.oci import Descriptor, Digest, Reference
from obdelta.oci.manifest import DOCKER_LAYER
from obdelta.store.catalogue.evictions import Evicted
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server
from tests.support.stack import running_stack
from tests.support.store import a_key, a_row, real_threads


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=8 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("registry")) as url:
        push(pair.base, url, BASE_REPOSITORY)
        push(pair.target, url, TARGET_REPOSITORY)
        yield url


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return bytes(answer.read())


def ask(server: RunningServer) -> str:
    url = (
        f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
        f"&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    )
    return str(json.loads(get(url))["name"])


def manifest_of(server: RunningServer, name: str) -> dict[str, object]:
    tag = name.rpartition(":")[2]
    found: dict[str, object] = json.loads(
        get(f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/{tag}")
    )
    return found


def large_layers(manifest: dict[str, object]) -> list[tuple[str, int]]:
    layers: list[dict[str, object]] = manifest["layers"]  # type: ignore[assignment]
    return [
        (str(layer["digest"]), int(str(layer["size"])))
        for layer in layers
        if int(str(layer["size"])) > 4096
    ]


def give_up(server: RunningServer, layers: list[tuple[str, int]]) -> None:
    """Has the quota enforced until none of them is there. With grace = 0 a delta stays for the
    second it was served in.
    """
    deadline = time.monotonic() + 20
    while any(path_of(server.state_dir, digest).exists() for digest, _ in layers):
        assert time.monotonic() < deadline, "the layers are still there"
        request = urllib.request.Request(
            f"{server.operator_url}/api/v1/gc",
            method="POST",
            data=b"{}",
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
        time.sleep(0.1)  # polled: the second must pass, and there is nothing to be notified by


def path_of(state: Path, digest: str) -> Path:
    hex_ = digest.partition(":")[2]
    return state / "blobs" / "sha256" / hex_[:2] / hex_


def update(server: RunningServer, work: Path) -> bool:
    work.mkdir()
    device = Device(Http(timeout=60), Engine(Http(), registry=server.url), server.url)
    base, target = f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"
    return device.update(device.load_base(Reference.parse(base), work), base, target, work).is_delta


SMALL = {"store_quota": "1", "grace": "0"}


def test_given_up_layers_come_back_the_same(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, **SMALL) as server:  # type: ignore[arg-type]
        name = ask(server)
        manifest = manifest_of(server, name)
        layers = large_layers(manifest)
        assert len(layers) >= 2
        blobs = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        whole = {digest: get(f"{blobs}/{digest}") for digest, _ in layers}
        give_up(server, layers)
        # Whoever asks is told the same as before, and HEAD makes nothing.
        assert ask(server) == name
        assert manifest_of(server, name) == manifest
        head = urllib.request.Request(f"{blobs}/{layers[0][0]}", method="HEAD")
        with urllib.request.urlopen(head, timeout=60) as answer:
            assert int(answer.headers["content-length"]) == layers[0][1]
        assert not path_of(server.state_dir, layers[0][0]).exists()
        # From an odd place in the middle of the last one, as an engine resumes; the same bytes as
        # before.
        digest, size = layers[-1]
        start = random.Random(5).randrange(1, size)
        request = urllib.request.Request(f"{blobs}/{digest}", headers={"range": f"bytes={start}-"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert (answer.status, answer.headers["content-range"]) == (
                206,
                f"bytes {start}-{size - 1}/{size}",
            )
            assert answer.read() == whole[digest][start:]
        assert {digest: get(f"{blobs}/{digest}") for digest, _ in layers} == whole
        # A device, too.
        give_up(server, layers)
        assert update(server, tmp_path / "device")
        assert list((server.state_dir / "tmp").iterdir()) == []
        counters = json.loads(get(f"{server.operator_url}/api/v1/builds"))
        assert counters["builds"] == []


OTHER_BASE = "v2/" + "0f" * 16


def layer_answers(
    server: RunningServer, layers: list[tuple[str, int]], token: str
) -> dict[str, tuple[int, bytes]]:
    found = {}
    for digest, _ in layers:
        url = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs/{digest}"
        with Http(timeout=60).ask("GET", url, {"Authorization": f"Bearer {token}"}) as answer:
            found[digest] = answer.status, b"".join(answer.chunks())
    return found


@pytest.mark.parametrize("credentials", ["builder", "device"])
def test_every_publication_of_an_evicted_layer_counts(
    pair: Pair, tmp_path: Path, credentials: str
) -> None:
    """Two fleets with the same base in repositories of their own, and a target
    that both may pull.
    """
    with running_stack(tmp_path, pair) as stack:
        push(
            pair.base,
            stack.registry.url,
            OTHER_BASE,
            authorization=stack.push_authorization(OTHER_BASE),
        )
        with stack.server(upstream_credentials=credentials, **SMALL) as server:  # type: ignore[arg-type]
            manifests = f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/"
            for base in (BASE_REPOSITORY, OTHER_BASE):
                status, _, body = stack.ask(server, base=base)
                assert status == 200, body
                tag = json.loads(body)["name"].rpartition(":")[2]
                token = stack.token(base, TARGET_REPOSITORY)
                with Http().ask(
                    "GET", manifests + tag, {"Authorization": f"Bearer {token}"}
                ) as answer:
                    layers = large_layers(json.loads(b"".join(answer.chunks())))
            neither = stack.token(TARGET_REPOSITORY)
            whole = layer_answers(server, layers, neither)
            assert {status for status, _ in whole.values()} == {200}
            for base in (BASE_REPOSITORY, OTHER_BASE):
                give_up(server, layers)
                assert layer_answers(server, layers, stack.token(base, TARGET_REPOSITORY)) == whole
            # Neither base: what this server can pull itself, it serves as if the layer were there;
            # else the answer names nobody.
            give_up(server, layers)
            answers = layer_answers(server, layers, neither)
            if credentials == "builder":
                assert answers == whole
            else:
                assert {status for status, _ in answers.values()} == {403}
            with Http().ask(
                "GET", manifests + tag, {"Authorization": f"Bearer {neither}"}
            ) as answer:
                answers["manifest"] = answer.status, b"".join(answer.chunks())
            assert answers["manifest"][0] == 403
            for _, body in answers.values():
                assert BASE_REPOSITORY.encode() not in body
                assert OTHER_BASE.encode() not in body


def change(state: Path, sql: str) -> None:
    with sqlite3.connect(state / "catalogue.sqlite") as connection:
        connection.execute(sql)
    connection.close()


def test_what_comes_out_otherwise_never_ends_as_if_whole(registry: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry, **SMALL) as server:  # type: ignore[arg-type]
        layers = large_layers(manifest_of(server, ask(server)))
        give_up(server, layers)
    # As if the recipe had changed without its number.
    change(
        state,
        """UPDATE deltas SET details = json_set(details, '$.effort', 'fast') WHERE kind = 'v3'""",
    )
    with running_server(state, upstream=registry, **SMALL) as server:  # type: ignore[arg-type]
        blobs = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        for digest, _ in layers:
            with pytest.raises((OSError, urllib.error.HTTPError)):
                get(f"{blobs}/{digest}")
        # Retired: the next who asks gets a delta that is right.
        assert update(server, tmp_path / "device")


def test_after_an_upgrade_that_changes_bytes_old_manifests_are_retired(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry, **SMALL) as server:  # type: ignore[arg-type]
        old = ask(server)
        layers = large_layers(manifest_of(server, old))
    change(state, "UPDATE deltas SET recipe = 0, tag = 'delta-0000000000000000'")
    # As long as all of it is there, a device that is pulling it goes on.
    with running_server(state, upstream=registry) as server:
        assert large_layers(manifest_of(server, "x:delta-0000000000000000")) == layers
    path_of(state, layers[0][0]).unlink()
    with running_server(state, upstream=registry) as server:
        # The name outlives its delta: it leads to the target's own.
        told = json.dumps(manifest_of(server, "x:delta-0000000000000000"))
        assert not any(digest in told for digest, _ in layers)
        assert update(server, tmp_path / "device")


def test_an_upgrade_retires_deltas_and_verdicts_of_an_older_recipe(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry, **SMALL) as server:  # type: ignore[arg-type]
        layers = large_layers(manifest_of(server, ask(server)))
    change(state, "UPDATE deltas SET recipe = 6, tag = 'delta-0000000000000000', last_served = 1")
    change(
        state,
        "INSERT INTO failures SELECT kind, base, target, 'not worth', 'too large', 1, unixepoch(),"
        " '', '', 6 FROM deltas",
    )
    with running_server(state, upstream=registry) as server:
        told = json.dumps(manifest_of(server, "x:delta-0000000000000000"))
        assert not any(digest in told for digest, _ in layers)
        assert not path_of(state, layers[0][0]).exists()
        assert update(server, tmp_path / "device")


def test_a_lost_file_is_made_again(registry: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry) as server:
        name = ask(server)
        layers = large_layers(manifest_of(server, name))
    path_of(state, layers[0][0]).unlink()
    path_of(state, layers[1][0]).write_bytes(b"half")
    with running_server(state, upstream=registry) as server:
        assert ask(server).rpartition(":")[2] == name.rpartition(":")[2]
        assert update(server, tmp_path / "device")


@pytest_twisted.ensureDeferred
async def test_layers_are_read_while_a_worker_writes_them(tmp_path: Path) -> None:
    content = random.Random(8).randbytes(100_000)
    layers = (Descriptor(DOCKER_LAYER, Digest.of(content), len(content)),)
    clock = Clock()
    with real_threads() as threads:
        for right in (True, False):
            rebuild = Rebuild(
                Evicted(a_row(a_key(1), Digest.of(b"manifest"), 1), layers, "balanced"), threads
            )
            file = rebuild.file(layers[0].digest)
            assert file is not None
            device, out = StringTransport(), tmp_path / f"out{right}"
            delivered = file.deliver(device, 0, len(content))
            following = rebuild.follow([out], clock)
            written = 0
            with out.open("wb", buffering=0) as worker:
                while written < len(content):
                    written += worker.write(content[written : written + 30_000])
                    clock.advance(LOOK_EVERY)
                    seen = min(written, len(content) - HELD_BACK)
                    await file.reached(seen - 1)
                    while len(device.value()) < seen:
                        await threads.run(lambda: None)
                    # The end is nobody's yet.
                    assert device.value() == content[:seen]
            following.stop()
            assert rebuild.file(Digest.of(b"other")) is None
            if right:
                rebuild.compare([{"digest": str(layers[0].digest), "size": len(content)}])
                rebuild.finished(dict.fromkeys([layers[0].digest], out).get)
                await delivered
                assert device.value() == content
                continue
            with pytest.raises(DigestMismatch) as mismatch:
                rebuild.compare([{"digest": str(Digest.of(b"other")), "size": len(content)}])
            rebuild.failed(mismatch.value)
            with pytest.raises((DigestMismatch, SizeMismatch)):
                await delivered
            assert len(device.value()) == len(content) - HELD_BACK
