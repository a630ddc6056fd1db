"""OCI layouts as a registry: what devices get from them over HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.web.http_headers import Headers

from obdelta.errors import UpstreamUnavailable
from obdelta.oci import Descriptor, Digest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import LayoutUpstream, ProxiedRequest
from tests.support.clients import Consumer, Memory
from tests.support.images import TARGET_REPOSITORY, Pair
from tests.support.layouts import ANONYMOUS, blob_path, pair, relayed, upstream

__all__ = ["pair", "upstream"]


@pytest_twisted.ensureDeferred
async def test_ping_tags_and_manifests_are_answered(pair: Pair, upstream: LayoutUpstream) -> None:
    ping, body = await relayed(upstream, "/v2/")
    assert (ping.status, body) == (200, b"{}")
    assert ping.headers.getRawHeaders(b"docker-distribution-api-version") == [b"registry/2.0"]
    tags, body = await relayed(upstream, f"/v2/{TARGET_REPOSITORY}/tags/list")
    assert (tags.status, json.loads(body)) == (200, {"name": TARGET_REPOSITORY, "tags": ["latest"]})
    image = pair.target
    for selector in ("latest", str(image.digest)):
        path = f"/v2/{TARGET_REPOSITORY}/manifests/{selector}"
        for method, expected in ((b"GET", image.manifest), (b"HEAD", b"")):
            answer, body = await relayed(upstream, path, method)
            assert (answer.status, body, answer.length) == (200, expected, len(expected))
            assert {name.lower(): values for name, values in answer.headers.getAllRawHeaders()} == {
                b"content-type": [DOCKER_MANIFEST.encode()],
                b"content-length": [b"%d" % len(image.manifest)],
                b"docker-content-digest": [str(image.digest).encode()],
                b"docker-distribution-api-version": [b"registry/2.0"],
                b"etag": [f'"{image.digest}"'.encode()],
            }
        answer, body = await relayed(upstream, path, if_none_match=f'"x", "{image.digest}"')
        assert (answer.status, body, answer.headers.hasHeader(b"content-length")) == (
            304,
            b"",
            False,
        )


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("bytes=0-", 0, None),
        ("bytes=100-", 100, None),
        ("bytes=100-199", 100, 200),
        ("bytes=100-99999999", 100, None),
        ("bytes=7-7", 7, 8),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_range_of_a_blob_is_answered(
    pair: Pair, upstream: LayoutUpstream, wanted: str, start: int, stop: int | None
) -> None:
    layer = pair.target.layers[1]
    content = layer.path.read_bytes()
    answer, body = await relayed(
        upstream, f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}", range=wanted
    )
    expected = content[start:stop]
    assert (answer.status, body, answer.length) == (206, expected, len(expected))
    last = start + len(expected) - 1
    assert answer.headers.getRawHeaders(b"content-range") == [
        b"bytes %d-%d/%d" % (start, last, len(content))
    ]
    assert answer.headers.getRawHeaders(b"content-length") == [b"%d" % len(expected)]


@pytest_twisted.ensureDeferred
async def test_other_ranges_get_the_whole_blob_or_an_error(
    pair: Pair, upstream: LayoutUpstream
) -> None:
    layer = pair.target.layers[1]
    path, content = f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}", layer.path.read_bytes()
    for ignored in ("bytes=5-2", "bytes=1-2,4-5", "chars=1-", "bytes=-5", "bytes=x-", ""):
        answer, body = await relayed(upstream, path, range=ignored)
        assert (answer.status, body) == (200, content)
    answer, body = await relayed(upstream, path, range="bytes=5-", if_range='"another"')
    assert (answer.status, body) == (200, content)
    answer, body = await relayed(upstream, path, range="bytes=5-", if_range=f'"{layer.digest}"')
    assert (answer.status, body) == (206, content[5:])
    answer, body = await relayed(upstream, path, range=f"bytes={len(content)}-")
    assert (answer.status, body) == (416, b"")
    assert answer.headers.getRawHeaders(b"content-range") == [b"bytes */%d" % len(content)]
    answer, body = await relayed(upstream, path, b"HEAD")
    assert (answer.status, body, answer.length) == (200, b"", 0)
    assert answer.headers.getRawHeaders(b"content-length") == [b"%d" % len(content)]
    answer, body = await relayed(upstream, path, if_none_match=f'"{layer.digest}"')
    assert (answer.status, body) == (304, b"")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"/v2/{TARGET_REPOSITORY}/manifests/none", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/{TARGET_REPOSITORY}/blobs/sha256:{'0' * 64}", 404, "BLOB_UNKNOWN"),
        (f"/v2/{TARGET_REPOSITORY}/blobs/sha256:../../index.json", 404, "UNSUPPORTED"),
        (f"/v2/{TARGET_REPOSITORY}/blobs/sha256:..", 400, "DIGEST_INVALID"),
        ("/v2/none/manifests/latest", 404, "NAME_UNKNOWN"),
        ("/v2/../etc/manifests/latest", 404, "NAME_UNKNOWN"),
        ("/v2/none/tags/list", 404, "NAME_UNKNOWN"),
        (f"/v2/{TARGET_REPOSITORY}/referrers/sha256:{'0' * 64}", 404, "UNSUPPORTED"),
        ("/v2/_catalog", 404, "UNSUPPORTED"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_errors_have_the_form_of_a_registry(
    upstream: LayoutUpstream, path: str, status: int, code: str
) -> None:
    answer, body = await relayed(upstream, path)
    assert (answer.status, json.loads(body)["errors"][0]["code"]) == (status, code)
    assert answer.headers.getRawHeaders(b"content-type") == [b"application/json"]


@pytest_twisted.ensureDeferred
async def test_a_blob_is_sent_at_the_pace_of_the_client(
    pair: Pair, upstream: LayoutUpstream
) -> None:
    content = os.urandom(2 * 1024 * 1024)
    digest = Digest.of(content)
    blob_path(pair, digest).write_bytes(content)
    path = f"/v2/{TARGET_REPOSITORY}/blobs/{digest}"

    class Paced(Consumer):
        def __init__(self) -> None:
            super().__init__()
            self.came: Deferred[None] = Deferred()

        def write(self, data: bytes) -> None:
            super().write(data)
            assert self.producer is not None
            self.producer.pauseProducing()
            came, self.came = self.came, Deferred()
            came.callback(None)

    answer = await upstream.relay(ProxiedRequest(b"GET", path, Headers(), ANONYMOUS))
    consumer, writes = Paced(), 0
    came = consumer.came
    done = answer.deliver(consumer)
    while len(consumer.content) < len(content):
        await came
        writes += 1
        assert len(consumer.content) == min(len(content), writes * 256 * 1024)
        came = consumer.came
        assert consumer.producer is not None
        consumer.producer.resumeProducing()
    await done
    assert bytes(consumer.content) == content

    for leave in ("stop", "cancel", "deferred"):
        answer = await upstream.relay(ProxiedRequest(b"GET", path, Headers(), ANONYMOUS))
        consumer = Paced()
        came = consumer.came
        done = answer.deliver(consumer)
        await came
        assert consumer.producer is not None
        if leave == "stop":
            consumer.producer.stopProducing()
        elif leave == "cancel":
            answer.cancel()
        else:
            done.cancel()
        with pytest.raises(CancelledError):
            await done
        assert len(consumer.content) == 256 * 1024
        answer.cancel()
        assert not consumer.registered_now()


@pytest_twisted.ensureDeferred
async def test_files_are_closed_whatever_happens(pair: Pair, upstream: LayoutUpstream) -> None:
    def open_blobs() -> list[str]:
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                target = str(entry.readlink())
            except OSError:
                continue  # the listing's own
            if str(pair.root) in target:
                found.append(target)
        return found

    layer = pair.target.layers[1]
    path = f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}"
    answer = await upstream.relay(ProxiedRequest(b"GET", path, Headers(), ANONYMOUS))
    assert len(open_blobs()) == 1
    answer.cancel()
    answer.cancel()
    await relayed(upstream, path)
    await relayed(upstream, path, b"HEAD")
    await relayed(upstream, path, range="bytes=5-9")
    await relayed(upstream, path, range="bytes=99999999-")
    await relayed(upstream, path, if_none_match=f'"{layer.digest}"')
    path_of_layer = blob_path(pair, layer.digest)
    content = path_of_layer.read_bytes()
    path_of_layer.unlink()
    path_of_layer.write_bytes(content[:-1])
    with pytest.raises(UpstreamUnavailable):
        await upstream.blob(TARGET_REPOSITORY, Descriptor("", layer.digest, 1), ANONYMOUS, Memory())
    assert open_blobs() == []


@pytest_twisted.ensureDeferred
async def test_a_blob_that_shrinks_is_a_failure(pair: Pair, upstream: LayoutUpstream) -> None:
    content = os.urandom(1024 * 1024)
    path = blob_path(pair, Digest.of(content))
    path.write_bytes(content)
    answer = await upstream.relay(
        ProxiedRequest(
            b"GET", f"/v2/{TARGET_REPOSITORY}/blobs/{Digest.of(content)}", Headers(), ANONYMOUS
        )
    )
    os.truncate(path, 300_000)
    consumer = Consumer()
    with pytest.raises(UpstreamUnavailable, match="shorter"):
        await answer.deliver(consumer)
    assert bytes(consumer.content) == content[:300_000] and consumer.producer is None
