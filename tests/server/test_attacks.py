"""Attacks on the real server: killed worker processes, a stop in mid-build, an odd upstream."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import treq
from twisted.internet.task import deferLater

from obdelta.oci.manifest import DOCKER_MANIFEST
from tests.server.test_v3 import ask
from tests.support.hostile import (
    HostileUpstream,
    dropping,
    hanging,
    hostile_upstream,
    ranged,
    reactor,
    response,
)
from tests.support.images import Pair
from tests.support.layout_server import BASE, TARGET, names, pair, server, update
from tests.support.processes import until
from tests.support.server import RunningServer, running_server
from tests.support.waiting import eventually

__all__ = ["pair", "server"]


def workers(server: RunningServer) -> list[int]:
    """The server's worker processes."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text(
        "ascii"
    )
    return [int(pid) for pid in children.split()]


def kill_writers(server: RunningServer, suffix: str) -> list[int]:
    """Kills the worker processes that have a file of this name open."""
    killed = []
    for pid in workers(server):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if any(link.readlink().suffix == suffix for link in Path(f"/proc/{pid}/fd").iterdir()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return killed


def files_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize("suffix", [".tar", ".delta"])
def test_a_killed_worker_costs_one_attempt(
    server: RunningServer, tmp_path: Path, suffix: str
) -> None:
    """Kills the worker process while it inflates layers, or while it builds the delta. The build's
    second attempt answers all waiting clients.
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
            await eventually("no file is left", lambda: files_in(server.state_dir / "tmp") == [])


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
