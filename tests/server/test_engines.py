"""skopeo and a real Docker engine as clients of the registry API; and the costs and faults of the
proxy itself.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.images import Entry, file, make_image, make_layer, push
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Reference
from tests.support.dockerd import RunningDockerd
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import builds, until
from tests.support.registry import RunningRegistry, running_registry
from tests.support.server import RunningServer, running_server

BIG = 500_000_000
"""Bytes of the large pair's target, uncompressed; about four fifths of it are in the base too."""
PROXY_MEMORY = 150 * 1024 * 1024


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(pair.base, running.url, BASE_REPOSITORY)
        push(pair.target, running.url, TARGET_REPOSITORY)
        yield running


@pytest.fixture(scope="module")
def server(
    registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with running_server(
        tmp_path_factory.mktemp("server") / "state", upstream=registry.url
    ) as running:
        yield running


def delta_name(server: RunningServer) -> str:
    url = (
        f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
        f"&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    )
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(json.loads(answer.read())["name"])


def skopeo(*arguments: str) -> str:
    ran = subprocess.run(
        ["skopeo", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_skopeo_copies_a_plain_image(server: RunningServer, pair: Pair, tmp_path: Path) -> None:
    skopeo(
        "copy",
        "--src-tls-verify=false",
        f"docker://{server.host}/{BASE_REPOSITORY}:latest",
        f"dir:{tmp_path / 'copy'}",
    )
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == pair.base.manifest
    for layer in pair.base.layers:
        assert (tmp_path / "copy" / layer.digest.hex).read_bytes() == layer.path.read_bytes()


def test_a_delta_image_is_an_image_to_skopeo(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    name = delta_name(server)
    shown = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{name}"))
    assert shown["Labels"]["io.resin.delta.base"] == str(pair.base.image_id)
    assert len(shown["Layers"]) == len(pair.target.layers)
    # Copying verifies every digest, and every diff_id that it writes.
    skopeo("copy", "--src-tls-verify=false", f"docker://{name}", f"dir:{tmp_path / 'copy'}")


def test_a_docker_engine_pulls_plain_images(
    server: RunningServer, pair: Pair, dockerd: RunningDockerd
) -> None:
    for repository, image in ((BASE_REPOSITORY, pair.base), (TARGET_REPOSITORY, pair.target)):
        dockerd.command("pull", f"{server.host}/{repository}:latest")
        assert dockerd.inspect(f"{server.host}/{repository}:latest")["Id"] == str(image.image_id)


def noise(seed: int, size: int) -> bytes:
    """Returns bytes that compress to about half, made quickly."""
    half = random.Random(seed).randbytes(size // 2)
    return half + bytes(size - len(half))


def big_entries(release: int) -> Iterator[Entry]:
    """Returns a hundred files; one in five differs between the releases."""
    size = BIG // 100
    for number in range(100):
        seed = number + 1000 * release if number % 5 == 0 else number
        yield file(f"data/{number:03}", noise(seed, size))


def test_half_a_gigabyte_is_proxied_in_little_memory(tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as registry:
        for release, repository in enumerate((BASE_REPOSITORY, TARGET_REPOSITORY)):
            blobs = tmp_path / f"blobs{release}"
            layers = [make_layer(big_entries(release), blobs, level=1)]
            push(make_image(layers, tmp_path / f"image{release}"), registry.url, repository)
        with running_server(tmp_path / "state", upstream=registry.url) as server:
            device = Device(Http(timeout=300), Engine(Http(), registry=server.url), server.url)
            (tmp_path / "work").mkdir()
            base, target = f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"
            done = device.update(
                device.load_base(Reference.parse(base), tmp_path / "work"),
                base,
                target,
                tmp_path / "work",
            )
            assert done.is_delta
            assert server.resident_bytes() < PROXY_MEMORY


def test_a_kill_at_any_moment_leaves_nothing_half_published(
    registry: RunningRegistry, tmp_path: Path
) -> None:
    """The server is killed at moments of a whole build. The next start must be clean and serve a
    right delta.
    """
    moments = random.Random(7)
    state = tmp_path / "state"
    for attempt in range(12):
        with running_server(state, upstream=registry.url, stop_with=signal.SIGKILL) as server:
            asking = threading.Thread(target=_ask_and_ignore, args=(server,))
            asking.start()
            time.sleep(
                moments.uniform(0.0, 0.6)
            )  # the moment is an input of the test, and no event is waited for
            server.process.kill()
            server.process.wait()
            asking.join()
        with running_server(state, upstream=registry.url) as server:
            device = Device(Http(timeout=60), Engine(Http(), registry=server.url), server.url)
            work = tmp_path / f"work{attempt}"
            work.mkdir()
            base, target = f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"
            done = device.update(device.load_base(Reference.parse(base), work), base, target, work)
            assert done.is_delta
            until("the other form is built, too", lambda: not builds(server))
            assert list((state / "tmp").iterdir()) == []
        if attempt % 2:
            # Every other time it starts with an empty state, so that all stages are hit.
            subprocess.run(["rm", "-rf", str(state)], check=True)


def _ask_and_ignore(server: RunningServer) -> None:
    try:
        delta_name(server)
    except OSError:
        return
