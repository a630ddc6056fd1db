"""The real server with an upstream that misbehaves (a double, because a real registry does not):
the right status, one line of reason, and nothing left on the disk.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_twisted
import treq
import zstandard
from twisted.internet.error import ConnectionLost
from twisted.web.client import ResponseFailed

from bench.images import Image, Layer
from obdelta.oci import Digest
from obdelta.oci.manifest import DOCKER_LAYER, DOCKER_MANIFEST
from tests.support.hostile import (
    Answer,
    HostileUpstream,
    dropping,
    hanging,
    hostile_upstream,
    ranged,
    response,
)
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server
from tests.support.waiting import eventually

MANIFEST = {name: f"/v2/{name}/manifests/latest" for name in (BASE_REPOSITORY, TARGET_REPOSITORY)}
CHALLENGE = 'Bearer realm="http://a.invalid/",service="s"'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)


def blob_path(repository: str, digest: object) -> str:
    return f"/v2/{repository}/blobs/{digest}"


def behave(upstream: HostileUpstream, pair: Pair) -> None:
    """Answers as a good registry does; a test then spoils one thing."""
    for repository, image in ((BASE_REPOSITORY, pair.base), (TARGET_REPOSITORY, pair.target)):
        say_manifest(upstream, repository, image.manifest)
        upstream.script(
            f"/v2/{repository}/manifests/{image.digest}",
            response(200, image.manifest, content_type=DOCKER_MANIFEST),
        )
        config = json.loads(image.manifest)["config"]["digest"]
        upstream.script(blob_path(repository, config), ranged(image.config))
        for layer in image.layers:
            upstream.script(blob_path(repository, layer.digest), ranged(layer.path.read_bytes()))


def say_manifest(upstream: HostileUpstream, repository: str, raw: bytes) -> None:
    upstream.script(MANIFEST[repository], response(200, raw, content_type=DOCKER_MANIFEST))


def last_layer(image: Image) -> Layer:
    """Returns a layer that a build must fetch: it is in the target, and not in the base."""
    return image.layers[2]


def with_layer(image: Image, blob: bytes) -> tuple[bytes, object]:
    """Returns a manifest with other bytes for :func:`last_layer` and a matching descriptor; the
    config still has the old diff_id.
    """
    manifest = json.loads(image.manifest)
    manifest["layers"][2] = {
        "mediaType": DOCKER_LAYER,
        "size": len(blob),
        "digest": str(Digest.of(blob)),
    }
    return json.dumps(manifest).encode(), Digest.of(blob)


Spoil = Callable[[HostileUpstream, Pair], None]


def manifest_says(answer: Answer, repository: str = TARGET_REPOSITORY) -> Spoil:
    return lambda upstream, pair: upstream.script(MANIFEST[repository], answer)


def layer_says(change: Callable[[bytes], Answer]) -> Spoil:
    def spoil(upstream: HostileUpstream, pair: Pair) -> None:
        layer = last_layer(pair.target)
        upstream.script(blob_path(TARGET_REPOSITORY, layer.digest), change(layer.path.read_bytes()))

    return spoil


def other_layer(blob: Callable[[], bytes]) -> Spoil:
    def spoil(upstream: HostileUpstream, pair: Pair) -> None:
        content = blob()
        manifest, digest = with_layer(pair.target, content)
        say_manifest(upstream, TARGET_REPOSITORY, manifest)
        upstream.script(blob_path(TARGET_REPOSITORY, digest), ranged(content))

    return spoil


def bomb() -> bytes:
    """Returns 1 GiB of zeros in about a megabyte."""
    return gzip.compress(bytes(1 << 30), 9)


def flipped(body: bytes) -> bytes:
    return body[:100] + bytes([body[100] ^ 1]) + body[101:]


CASES: dict[str, tuple[Spoil, int]] = {
    "manifest is not JSON": (
        manifest_says(response(200, b"<html>", content_type=DOCKER_MANIFEST)),
        200,
    ),
    "manifest is an empty object": (
        manifest_says(response(200, b"{}", content_type=DOCKER_MANIFEST)),
        200,
    ),
    "manifest of 50 MB": (
        manifest_says(response(200, bytes(50_000_000), content_type=DOCKER_MANIFEST)),
        200,
    ),
    "upstream says 401": (manifest_says(response(401, b"{}", www_authenticate=CHALLENGE)), 401),
    "upstream says 403": (manifest_says(response(403, b"{}")), 403),
    "upstream says 404": (manifest_says(response(404, b"{}")), 404),
    "upstream says 429": (manifest_says(response(429, b"{}")), 502),
    "upstream says 500": (manifest_says(response(500, b"oops")), 502),
    "upstream hangs": (manifest_says(hanging()), 502),
    "manifest breaks off": (manifest_says(dropping(b"x" * 1000, 10)), 502),
    "layer is not what its digest says": (layer_says(lambda body: ranged(flipped(body))), 502),
    "layer is longer than declared": (layer_says(lambda body: response(200, body + b"more")), 502),
    "layer is shorter than declared": (layer_says(lambda body: response(200, body[:-5])), 502),
    "layer always breaks off": (layer_says(lambda body: dropping(body, 50)), 502),
    "layer is 403": (layer_says(lambda body: response(403, b"{}")), 403),
    "layer is 500": (layer_says(lambda body: response(500, b"{}")), 502),
    "layer is not a tar": (other_layer(lambda: gzip.compress(b"not a tar" * 500)), 200),
    "layer is not gzip": (other_layer(lambda: b"\x1f\x8bnonsense" * 50), 200),
    "layer is a truncated gzip": (other_layer(lambda: gzip.compress(bytes(5000))[:-9]), 200),
    "layer is a truncated zstd": (other_layer(lambda: zstandard.compress(bytes(5000))[:-3]), 200),
    "layer inflates to another diff_id": (other_layer(lambda: gzip.compress(bytes(1024))), 200),
    "layer is a gzip bomb": (other_layer(bomb), 200),
}


@asynccontextmanager
async def before(upstream: HostileUpstream, tmp_path: Path) -> AsyncIterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=upstream.url, request_timeout="2") as server:
        yield server


def left_behind(state_dir: Path) -> list[str]:
    """Returns temporary files and blobs: nothing was published, so only the server's first files
    may exist.
    """
    return [
        str(path)
        for place in ("tmp", "blobs")
        for path in (state_dir / place).rglob("*")
        if path.is_file()
    ]


@pytest.mark.parametrize("case", CASES)
@pytest_twisted.ensureDeferred
async def test_each_fault_of_the_upstream_has_its_documented_answer(
    case: str, pair: Pair, tmp_path: Path
) -> None:
    spoil, status = CASES[case]
    async with hostile_upstream() as upstream, before(upstream, tmp_path) as server:
        behave(upstream, pair)
        spoil(upstream, pair)
        at_start = left_behind(server.state_dir)
        url = (
            f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
            f"&dest={server.host}/{TARGET_REPOSITORY}"
        )
        # A request may be slow, but it must end; `hold` ends one that hangs.
        wait = "" if case == "upstream hangs" else "&wait=true"
        answer = await treq.get(url + wait, persistent=False)
        body = await answer.content()
        assert answer.code == status, body
        if status == 200:
            # A retry cannot change it: the first answer is the target's own name.
            assert json.loads(body) == {"name": f"{server.host}/{TARGET_REPOSITORY}"}
            assert "category=image-unusable" in server.log
            assert "outcome=failed" not in server.log
        else:
            assert body.count(b"\n") == 1
        assert b"Traceback" not in body
        assert str(tmp_path).encode() not in body
        # The answer may come just before the files are gone.
        await eventually("no file is left", lambda: left_behind(server.state_dir) == at_start)
        # The same server still builds once the upstream works again.
        behave(upstream, pair)
        again = await treq.get(f"{url}@{pair.target.digest}&wait=true", persistent=False)
        assert b":delta-" in await again.content()


@pytest_twisted.ensureDeferred
async def test_a_cut_proxied_body_never_ends_as_if_complete(pair: Pair, tmp_path: Path) -> None:
    layer = last_layer(pair.target)
    async with hostile_upstream() as upstream, before(upstream, tmp_path) as server:
        behave(upstream, pair)
        body = layer.path.read_bytes()
        upstream.script(blob_path(TARGET_REPOSITORY, layer.digest), dropping(body, len(body) // 2))
        with pytest.raises((ResponseFailed, ConnectionLost)):
            answer = await treq.get(
                server.url + blob_path(TARGET_REPOSITORY, layer.digest), persistent=False
            )
            await answer.content()
