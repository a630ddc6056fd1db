"""The upstream's blobs through the real server: fetched once, shared while they arrive, cached,
and served only to clients with access.

The upstream is a double where requests are counted or held, and Debian's docker-registry where it
decides about access.
"""

from __future__ import annotations

import random
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import treq
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, gatherResults
from twisted.internet.error import ConnectionLost
from twisted.internet.threads import deferToThread
from twisted.web.client import ResponseFailed

from bench.images import push
from obdelta.oci import Digest
from obdelta.oci.manifest import DOCKER_MANIFEST
from tests.support.hostile import (
    Gated,
    HostileUpstream,
    hostile_upstream,
    ranged,
    response,
)
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.registry import running_token_registry
from tests.support.server import RunningServer, running_server
from tests.support.tokens import Issuer, pulls
from tests.support.waiting import eventually

BODY = random.Random(6).randbytes(1 << 20)
DIGEST = Digest.of(BODY)
PATH = f"/v2/v2/{'d' * 32}/blobs/{DIGEST}"


@asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[tuple[HostileUpstream, RunningServer]]:
    async with hostile_upstream() as upstream:
        with running_server(tmp_path / "state", upstream=upstream.url, drain="0") as server:
            yield upstream, server


def fetches(upstream: HostileUpstream, path: str = PATH) -> int:
    return sum(1 for request in upstream.requests_to(path) if request.method == "GET")


class Download:
    """A device's download: ``content`` so far; ``done`` fires with all of it."""

    def __init__(self, server: RunningServer, **headers: str) -> None:
        self.content = bytearray()
        self.code = 0
        self.response: Any = None
        self.done: Deferred[bytes] = ensureDeferred(self._run(server, headers))

    async def _run(self, server: RunningServer, headers: Any) -> bytes:
        self.response = await treq.get(
            server.url + PATH, headers=headers, unbuffered=True, persistent=False
        )
        self.code = self.response.code
        await treq.collect(self.response, self.content.extend)
        return bytes(self.content)

    async def has(self, size: int) -> None:
        """Waits until this much has arrived."""
        await eventually(f"{size} bytes have come", lambda: len(self.content) >= size)


@pytest_twisted.ensureDeferred
async def test_all_clients_share_one_fetch_and_are_served_while_it_arrives(tmp_path: Path) -> None:
    async with served(tmp_path) as (upstream, server):
        gate = Gated(BODY, len(BODY) // 2)
        upstream.script(PATH, gate)
        devices = [Download(server) for _ in range(12)]
        part = Download(server, range=f"bytes=1000-{len(BODY) // 3}")
        assert await part.done == BODY[1000 : len(BODY) // 3 + 1]
        assert part.code == 206
        for device in devices:
            await device.has(len(BODY) // 2)
        rest = Download(server, range=f"bytes={len(BODY) // 4}-")
        await rest.has(len(BODY) // 4)
        # A client that leaves does not end it for the others.
        leaves = devices.pop(0)
        leaves.done.addErrback(
            lambda failure: failure.trap(ResponseFailed, ConnectionLost, CancelledError) and b""
        )
        leaves.done.cancel()
        gate.go_on()
        assert await rest.done == BODY[len(BODY) // 4 :]
        assert await gatherResults([device.done for device in devices]) == [BODY] * len(devices)
        assert fetches(upstream) == 1
        # After that it is cached, across a restart too.
        assert await Download(server).done == BODY
        assert fetches(upstream) == 1
        assert list((server.state_dir / "tmp").iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_wrong_bytes_are_never_sent_completely_and_never_kept(tmp_path: Path) -> None:
    async with served(tmp_path) as (upstream, server):
        wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
        upstream.script(PATH, ranged(wrong))
        device = Download(server)
        with pytest.raises((ResponseFailed, ConnectionLost)):
            await device.done
        assert len(device.content) < len(BODY)
        upstream.script(PATH, ranged(BODY, at=300_000))  # cut again and again, and resumed
        assert await Download(server).done == BODY
        assert list((server.state_dir / "tmp").iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_builds_and_devices_share_fetched_blobs(tmp_path: Path) -> None:
    pair = await deferToThread(make_pair, tmp_path / "pair", size=64 << 10)
    async with served(tmp_path) as (upstream, server):
        for repository, image in ((BASE_REPOSITORY, pair.base), (TARGET_REPOSITORY, pair.target)):
            for selector in ("latest", str(image.digest)):
                upstream.script(
                    f"/v2/{repository}/manifests/{selector}",
                    response(200, image.manifest, content_type=DOCKER_MANIFEST),
                )
            upstream.script(f"/v2/{repository}/blobs/{image.image_id}", ranged(image.config))
            for layer in image.layers:
                upstream.script(
                    f"/v2/{repository}/blobs/{layer.digest}", ranged(layer.path.read_bytes())
                )
        url = (
            f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
            f"&dest={server.host}/{TARGET_REPOSITORY}"
        )
        assert b":delta-" in await (await treq.get(url + "&wait=true", persistent=False)).content()
        for layer in pair.base.layers:
            path = f"/v2/{BASE_REPOSITORY}/blobs/{layer.digest}"
            answer = await treq.get(server.url + path, persistent=False)
            assert await answer.content() == layer.path.read_bytes()
            assert fetches(upstream, path) == 1


def test_cached_blobs_are_served_only_to_clients_that_may_pull_them(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", size=64 << 10)
    with running_token_registry(tmp_path / "registry") as registry:
        assert registry.tokens is not None
        issuer = registry.tokens.issuer
        for repository, image in ((BASE_REPOSITORY, pair.base), (TARGET_REPOSITORY, pair.target)):
            push(
                image,
                registry.url,
                repository,
                authorization=registry.tokens.push_authorization(repository),
            )
        private = pair.target.layers[2].digest
        with running_server(
            tmp_path / "state", upstream=registry.url, upstream_credentials="device"
        ) as server:
            _who_gets_it(server, issuer, str(private))


def _who_gets_it(server: RunningServer, issuer: Issuer, private: str) -> None:
    def get(repository: str, *granted: str) -> int:
        headers = {"authorization": f"Bearer {issuer.token(pulls(*granted))}"} if granted else {}
        url = f"{server.url}/v2/{repository}/blobs/{private}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=30
            ) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    for _ in range(2):  # before it is cached, and after
        assert get(TARGET_REPOSITORY) == 401
        assert get(TARGET_REPOSITORY, BASE_REPOSITORY) in (401, 403)
        assert get(BASE_REPOSITORY, BASE_REPOSITORY) == 404
        assert get(TARGET_REPOSITORY, TARGET_REPOSITORY) == 200
    assert len(list((server.state_dir / "upstream").iterdir())) == 1
