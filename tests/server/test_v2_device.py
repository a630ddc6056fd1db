"""v2 end to end with the code that devices run: a supervisor's steps through resumable-request and
docker-delta on Node 12.

The server runs as an ordinary user; the connection is cut twice; the result is compared with the
target's own root filesystem in the same engine, entry by entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from bench.images import push
from obdelta.rootfs.delay import TOKENS
from obdelta.rsync import batch
from tests.support import rootfs
from tests.support.cut_answers import Cutter, cutting_answers
from tests.support.dockerd import RunningDockerd, dockerd
from tests.support.held_rsync import HeldRsync
from tests.support.registry import running_registry
from tests.support.server import RunningServer, free_port
from tests.support.unprivileged import NOBODY, nobodys_server
from tests.unit.rootfs.test_engine import layers_with_everything, unlike
from tests.unit.rsync.test_device import layers_before

__all__ = ["dockerd"]

NODE = Path(__file__).parents[1] / "node"
OLD_NODE = (
    NODE
    / "node_modules"
    / f"node-linux-{ {'x86_64': 'x64', 'aarch64': 'arm64'}[platform.machine()] }/bin/node"
)
BASE, TARGET = "v2/" + "0d" * 16, "v2/" + "1e" * 16


@dataclass(frozen=True)
class Releases:
    """Both releases are in the registry and in the engine."""

    registry: str
    base_id: str
    target_id: str
    tree: Path
    since: float


@pytest.fixture(scope="module")
def releases(
    dockerd: RunningDockerd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Releases]:
    directory = tmp_path_factory.mktemp("releases")
    chance = random.Random(5)
    big = [
        rootfs.file(f"srv/noise{number}", chance.randbytes(300_000), owner=(33, 33))
        for number in range(5)
    ]
    attributes = {"SCHILY.xattr.user.mark": "the reference does not send them"}
    base = rootfs.image([*layers_before(), [rootfs.file("srv/gone", b"1")]], directory / "base")
    target = rootfs.image(
        [*layers_with_everything(), [*big, rootfs.file("srv/marked", b"x", pax=attributes)]],
        directory / "target",
        config={"config": {"Cmd": ["/bin/tool"], "Labels": {"release": "2"}}},
    )
    assert len(target.layers) >= 4
    since = time.time()
    with running_registry(directory / "registry") as running:
        push(base, running.url, BASE)
        push(target, running.url, TARGET)
        tree = rootfs.tree(target, directory / "tree")
        yield Releases(running.url, dockerd.load(base), dockerd.load(target), tree, since)


def update(
    engine: RunningDockerd,
    releases: Releases,
    server: RunningServer,
    port: int,
    *more: str,
    node: str | Path = OLD_NODE,
    base: str = BASE,
) -> dict[str, Any]:
    """Returns the supervisor's result. ``more``: see v2_update.js."""
    host = f"127.0.0.1:{port}"
    question = f"http://{host}/api/v2/delta?src={host}/{base}&dest={host}/{TARGET}"
    ran = subprocess.run(
        [
            node,
            NODE / "v2_update.js",
            question,
            releases.base_id,
            "59000" if more else "1500",
            *more,
        ],
        env={**os.environ, "DOCKER_HOST": engine.url},
        capture_output=True,
        text=True,
        timeout=300,  # rsync is kept busy, which takes far longer on a busy machine
        check=False,
    )
    assert ran.stdout, ran.stderr + server.log[-3000:]
    return dict(json.loads(ran.stdout))


def is_the_target(engine: RunningDockerd, releases: Releases, image_id: str) -> None:
    with engine.mounted(image_id) as result:
        assert unlike(releases.tree, result, releases.since) == []
    shown = engine.inspect(image_id)["Config"]
    assert {**shown, "Image": ""} == engine.inspect(releases.target_id)["Config"]


def test_a_device_updates_over_a_connection_that_breaks_twice(
    dockerd: RunningDockerd, releases: Releases
) -> None:
    port = free_port()
    with (
        cutting_answers(port, [400_000, 300_000]) as cutter,
        nobodys_server(
            port=port,
            public_url=f"http://127.0.0.1:{cutter.port}",
            upstream=releases.registry,
            max_delta_ratio="10",
        ) as server,
    ):
        updated = update(dockerd, releases, server, cutter.port)
        assert updated.get("retries") == cutter.made == 2, (updated, server.log[-2000:])
        assert server.log.count("path=/api/v2/delta/download status=206") == 2
        is_the_target(dockerd, releases, updated["id"])


def test_a_device_updates_over_such_a_connection_while_rsync_writes(
    dockerd: RunningDockerd, releases: Releases
) -> None:
    """The download is cut twice and resumed while rsync still writes, and is padded to the
    announced length.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="nobody-") as name:
        os.chown(name, NOBODY, NOBODY)
        rsync = HeldRsync(Path(name) / "bin", python="/usr/bin/python3")
        os.chown(Path(name) / "bin", NOBODY, NOBODY)
        with (
            cutting_answers(port, [400_000, 300_000]) as cutter,
            nobodys_server(
                port=port,
                public_url=f"http://127.0.0.1:{cutter.port}",
                upstream=releases.registry,
                environment=rsync.environment,
                v2_streaming="padded",
                constants={"obdelta.web.devices.v2.MAX_PADDING": 0.5},
                max_delta_ratio="10",
            ) as server,
        ):
            let_go = threading.Thread(target=_when_cut, args=(cutter, rsync))
            let_go.start()
            updated = update(dockerd, releases, server, cutter.port)
            let_go.join()
            assert updated.get("retries") == cutter.made == 2, (updated, server.log[-2000:])
            assert int(parse_qs(urlsplit(updated["location"]).query)["length"][0]) > 1_500_000
            is_the_target(dockerd, releases, updated["id"])


def _when_cut(cutter: Cutter, rsync: HeldRsync) -> None:
    """Lets rsync continue after the download has been resumed for the second time."""
    deadline = time.monotonic() + 60
    while (cutter.made < 2 or cutter.connections < 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    rsync.go_on()


CURRENT = ("4", "16.2.33", "10000")
"""Versions of docker-delta and the supervisor, and its default retry interval, after which it
closes a stream that has ended.
"""


def test_supervisors_that_close_the_stream_late_get_the_target(
    dockerd: RunningDockerd, releases: Releases
) -> None:
    """docker-delta 4 reports a failure if rsync ends before its stream does, so rsync is kept busy
    until then.
    """
    with nobodys_server(upstream=releases.registry, max_delta_ratio="10") as server:
        updated = update(dockerd, releases, server, server.port, *CURRENT, node="node")
        assert "id" in updated, (updated, server.log[-2000:])
        is_the_target(dockerd, releases, updated["id"])


@contextlib.contextmanager
def static_files(directory: Path) -> Iterator[int]:
    """Runs Twisted's own file server on a free port, with lengths and ranges."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "twisted",
        "web",
        "--listen",
        f"tcp:{port}:interface=127.0.0.1",
        "--path",
        str(directory),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize("delayed", [True, False])
def test_an_answer_without_a_delta_ends_where_rsync_outlives_the_stream(
    dockerd: RunningDockerd, releases: Releases, tmp_path: Path, delayed: bool
) -> None:
    """With the short answer, current supervisors retry for ever. The delay is shorter than the
    real one.
    """
    stream = batch.delayed_out_of_sync(TOKENS // 8) if delayed else batch.out_of_sync()
    (tmp_path / "stream").write_bytes(stream)
    more = ["59000", "4", "16.2.33", "1000" if delayed else "10000", "located"]
    with static_files(tmp_path) as port:
        ran = subprocess.run(
            [
                "node",
                NODE / "v2_update.js",
                f"http://127.0.0.1:{port}/stream",
                releases.base_id,
                *more,
            ],
            env={**os.environ, "DOCKER_HOST": dockerd.url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    parsed = json.loads(ran.stdout)
    assert parsed["outOfSync"] is delayed, parsed
    assert ("Premature close" in parsed["error"]) is not delayed, parsed
