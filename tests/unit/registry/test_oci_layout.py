"""The embedded upstream: folders of OCI image layouts, well-formed, broken and hostile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.web.http_headers import Headers

from bench.images import make_index
from obdelta.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    ObdeltaError,
    UpstreamUnavailable,
)
from obdelta.oci import Descriptor, Digest, Index, Manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import Credentials, LayoutUpstream, ProxiedRequest, ProxiedResponse
from tests.support.clients import Consumer, Memory, running_threads
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair

ANONYMOUS = Credentials.anonymous()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "root")


@pytest.fixture
def upstream(pair: Pair) -> Iterator[LayoutUpstream]:
    with running_threads() as threads:
        yield LayoutUpstream(pair.root, threads)


def blob_path(pair: Pair, digest: Digest, repository: str = TARGET_REPOSITORY) -> Path:
    return pair.root / repository / "blobs" / "sha256" / digest.hex


async def relayed(
    upstream: LayoutUpstream, path: str, method: bytes = b"GET", **headers: str
) -> tuple[ProxiedResponse, bytes]:
    named = Headers(
        {name.replace("_", "-").encode(): [value.encode()] for name, value in headers.items()}
    )
    answer = await upstream.relay(ProxiedRequest(method, path, named, ANONYMOUS))
    consumer = Consumer()
    await answer.deliver(consumer)
    assert consumer.producer is None
    return answer, bytes(consumer.content)


@pytest_twisted.ensureDeferred
async def test_an_image_is_read_from_a_layout(pair: Pair, upstream: LayoutUpstream) -> None:
    manifest = await upstream.manifest(TARGET_REPOSITORY, "latest", ANONYMOUS)
    assert isinstance(manifest, Manifest) and manifest.raw == pair.target.manifest
    assert await upstream.manifest(TARGET_REPOSITORY, str(manifest.digest), ANONYMOUS) == manifest
    assert (
        await upstream.small_blob(TARGET_REPOSITORY, manifest.config, ANONYMOUS, 1 << 20)
        == pair.target.config
    )
    for descriptor, layer in zip(manifest.layers, pair.target.layers, strict=True):
        sink = Memory()
        await upstream.blob(TARGET_REPOSITORY, descriptor, ANONYMOUS, sink)
        assert bytes(sink.content) == layer.path.read_bytes()
    await upstream.close()


@pytest_twisted.ensureDeferred
async def test_an_index_and_its_images_are_read(pair: Pair, upstream: LayoutUpstream) -> None:
    make_index(
        [(pair.base, {"os": "linux", "architecture": "amd64"})],
        pair.base.layout,
        name="all",
        format="oci",
    )
    index = await upstream.manifest(BASE_REPOSITORY, "all", ANONYMOUS)
    assert isinstance(index, Index)
    # Even if index.json no longer names the image itself.
    path = pair.root / BASE_REPOSITORY / "index.json"
    entries = json.loads(path.read_bytes())
    entries["manifests"] = [
        entry for entry in entries["manifests"] if entry["digest"] == str(index.digest)
    ]
    path.write_text(json.dumps(entries))
    nested = await upstream.manifest(BASE_REPOSITORY, str(pair.base.digest), ANONYMOUS)
    assert nested.raw == pair.base.manifest
    with pytest.raises(ManifestUnknown):
        await upstream.manifest(BASE_REPOSITORY, "latest", ANONYMOUS)


def rename(pair: Pair, *entries: dict[str, str] | None) -> None:
    """Lists the target's manifest once for each of these annotations; None: without any."""
    path = pair.root / TARGET_REPOSITORY / "index.json"
    index = json.loads(path.read_bytes())
    entry = index["manifests"][0]
    entry.pop("annotations", None)
    index["manifests"] = [
        entry if names is None else {**entry, "annotations": names} for names in entries
    ]
    path.write_text(json.dumps(index))


REF, CONTAINERD = "org.opencontainers.image.ref.name", "io.containerd.image.name"


@pytest.mark.parametrize(
    ("annotations", "selector"),
    [
        ({REF: "docker.io/library/app:1.0"}, "1.0"),
        ({REF: "registry.example.com:5000/v2/app"}, "latest"),
        ({REF: f"registry2.example.com/{TARGET_REPOSITORY}:latest"}, "latest"),
        ({REF: "app:latest@sha256:" + "a" * 64}, "latest"),
        ({CONTAINERD: "docker.io/library/app:2.0", REF: "2.0"}, "2.0"),
        ({CONTAINERD: "docker.io/library/app:2.0"}, "2.0"),
        (None, "latest"),
        ({}, "latest"),
        ({REF: "not a name!"}, "latest"),
        ({"some.tool/name": "app"}, "latest"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_names_of_other_tools_are_understood(
    pair: Pair, upstream: LayoutUpstream, annotations: dict[str, str] | None, selector: str
) -> None:
    rename(pair, annotations)
    found = await upstream.manifest(TARGET_REPOSITORY, selector, ANONYMOUS)
    assert found.raw == pair.target.manifest


@pytest_twisted.ensureDeferred
async def test_an_error_lists_the_images_of_the_layout(
    pair: Pair, upstream: LayoutUpstream
) -> None:
    rename(pair, {REF: "docker.io/library/app:1.0"}, {REF: "2.0"})
    with pytest.raises(ManifestUnknown, match=r"it has the tags 2\.0, library/app:1\.0$"):
        await upstream.manifest(TARGET_REPOSITORY, "latest", ANONYMOUS)
    rename(pair, None)
    with pytest.raises(
        ManifestUnknown, match=f"it has images without a tag: {pair.target.digest}$"
    ):
        await upstream.manifest(TARGET_REPOSITORY, "3.0", ANONYMOUS)
    answer, body = await relayed(upstream, f"/v2/{TARGET_REPOSITORY}/manifests/3.0")
    assert answer.status == 404 and str(pair.target.digest).encode() in body


@pytest_twisted.ensureDeferred
async def test_the_repositorys_own_image_counts_among_several_with_a_tag(
    pair: Pair, upstream: LayoutUpstream
) -> None:
    own = TARGET_REPOSITORY.rpartition("/")[2]
    make_index([(pair.target, {"os": "linux"})], pair.target.layout, name="all", format="oci")
    path = pair.root / TARGET_REPOSITORY / "index.json"
    index = json.loads(path.read_bytes())
    first, second = index["manifests"]
    first["annotations"], second["annotations"] = (
        {REF: "docker.io/library/other:1.0"},
        {REF: f"docker.io/x/{own}:1.0"},
    )
    path.write_text(json.dumps(index))
    assert isinstance(await upstream.manifest(TARGET_REPOSITORY, "1.0", ANONYMOUS), Index)
    second["annotations"] = {REF: "docker.io/x/third:1.0"}
    path.write_text(json.dumps(index))
    with pytest.raises(ManifestUnknown, match=r"it has the tags library/other:1\.0, x/third:1\.0"):
        await upstream.manifest(TARGET_REPOSITORY, "1.0", ANONYMOUS)


@pytest_twisted.ensureDeferred
async def test_sizes_in_manifests_may_be_wrong(pair: Pair, upstream: LayoutUpstream) -> None:
    layer, config = pair.target.layers[0], pair.target.image_id
    for wrong in (-1, 1):
        sink = Memory()
        size = layer.path.stat().st_size + wrong
        await upstream.blob(TARGET_REPOSITORY, Descriptor("", layer.digest, size), ANONYMOUS, sink)
        assert bytes(sink.content) == layer.path.read_bytes()
        size = len(pair.target.config) + wrong
        assert await upstream.small_blob(
            TARGET_REPOSITORY, Descriptor("", config, size), ANONYMOUS, 1 << 20
        )
    assert (
        await upstream.blob_size(TARGET_REPOSITORY, layer.digest, ANONYMOUS)
        == layer.path.stat().st_size
    )


@pytest_twisted.ensureDeferred
async def test_missing_images_and_blobs_are_errors(pair: Pair, upstream: LayoutUpstream) -> None:
    for selector in ("none", "sha256:" + "0" * 64, str(pair.target.layers[0].digest)):
        with pytest.raises(ManifestUnknown):
            await upstream.manifest(TARGET_REPOSITORY, selector, ANONYMOUS)
    for repository in (
        "v2/none",
        "v2",
        f"{TARGET_REPOSITORY}/blobs",
        "..",
        "../root",
        "/etc",
        "a//b",
        "A",
        "x" * 300,
    ):
        with pytest.raises(NameUnknown):
            await upstream.manifest(repository, "latest", ANONYMOUS)
        with pytest.raises(NameUnknown):
            await upstream.blob(
                repository, Descriptor("", pair.target.digest, 1), ANONYMOUS, Memory()
            )
    with pytest.raises(BlobUnknown):
        await upstream.blob(
            TARGET_REPOSITORY, Descriptor("", Digest("0" * 64), 1), ANONYMOUS, Memory()
        )


@pytest_twisted.ensureDeferred
async def test_broken_files_are_errors(pair: Pair, upstream: LayoutUpstream) -> None:
    manifest = await upstream.manifest(TARGET_REPOSITORY, "latest", ANONYMOUS)
    assert isinstance(manifest, Manifest)
    layer = manifest.layers[0]
    path = blob_path(pair, layer.digest)
    content = path.read_bytes()

    async def fetch() -> None:
        await upstream.blob(TARGET_REPOSITORY, layer, ANONYMOUS, Memory())

    for broken, expected in [
        (content[:-1], UpstreamUnavailable),
        (content + b"x", UpstreamUnavailable),
        (content[:-1] + bytes([content[-1] ^ 1]), UpstreamUnavailable),
    ]:
        path.unlink()
        path.write_bytes(broken)
        with pytest.raises(expected):
            await fetch()
    with pytest.raises(ManifestInvalid, match="over 10"):
        await upstream.small_blob(TARGET_REPOSITORY, manifest.config, ANONYMOUS, 10)
    config = blob_path(pair, manifest.config.digest)
    original = config.read_bytes()
    config.unlink()
    config.write_bytes(original.swapcase())
    with pytest.raises(UpstreamUnavailable):
        await upstream.small_blob(TARGET_REPOSITORY, manifest.config, ANONYMOUS, 1 << 20)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b"not json", ManifestInvalid),
        (b"{}", ManifestInvalid),
        (b'{"manifests": [7]}', ManifestInvalid),
        (
            (
                b'{"manifests": [{"digest": "sha256:../../../etc/passwd", "size": 1, "mediaType":'
                b' "x"}]}'
            ),
            ManifestInvalid,
        ),
        (b" " * (5 * 1024 * 1024), ManifestInvalid),
        (b'{"manifests": []}', ManifestUnknown),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_broken_index_is_an_error(
    pair: Pair, upstream: LayoutUpstream, index: bytes, expected: type[ObdeltaError]
) -> None:
    (pair.root / TARGET_REPOSITORY / "index.json").write_bytes(index)
    with pytest.raises(expected):
        await upstream.manifest(TARGET_REPOSITORY, "latest", ANONYMOUS)
    path = f"/v2/{TARGET_REPOSITORY}/manifests/latest"
    if expected is ManifestInvalid:
        with pytest.raises(UpstreamUnavailable):
            await relayed(upstream, path)
    else:
        assert (await relayed(upstream, path))[0].status == 404


@pytest_twisted.ensureDeferred
async def test_nothing_outside_of_the_folder_is_opened(
    pair: Pair, upstream: LayoutUpstream, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    digest, size = Digest.of(b"secret"), 6
    path = blob_path(pair, digest)
    wanted = Descriptor("", digest, size)
    path.symlink_to(secret)
    with pytest.raises(BlobUnknown):
        await upstream.blob(TARGET_REPOSITORY, wanted, ANONYMOUS, Memory())
    assert (await relayed(upstream, f"/v2/{TARGET_REPOSITORY}/blobs/{digest}"))[0].status == 404
    # A complete layout elsewhere, and a link that leads in circles.
    shutil.copytree(pair.root / TARGET_REPOSITORY, tmp_path / "elsewhere")
    (pair.root / "linked").symlink_to(tmp_path / "elsewhere")
    (pair.root / "circle").symlink_to("circle")
    for repository in ("linked", "circle"):
        with pytest.raises(NameUnknown):
            await upstream.manifest(repository, "latest", ANONYMOUS)
    # A link within the folder is the operator's decision.
    path.unlink()
    (pair.root / "inside").write_bytes(b"secret")
    path.symlink_to("../../../../inside")
    sink = Memory()
    await upstream.blob(TARGET_REPOSITORY, wanted, ANONYMOUS, sink)
    assert sink.content == b"secret"
    # Only files are opened: nothing else is waited for.
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BlobUnknown):
        await upstream.blob(TARGET_REPOSITORY, wanted, ANONYMOUS, Memory())
    path.unlink()
    path.mkdir()
    with pytest.raises(BlobUnknown):
        await upstream.blob(TARGET_REPOSITORY, wanted, ANONYMOUS, Memory())


# -- as a registry -----------------------------------------------------------------------------


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
