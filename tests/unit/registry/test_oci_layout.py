"""The embedded upstream: directories of OCI image layouts, well-formed, broken and hostile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import pytest_twisted

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
from obdelta.registry import LayoutUpstream
from tests.support.clients import Memory
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.layouts import ANONYMOUS, blob_path, pair, relayed, upstream

__all__ = ["pair", "upstream"]


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
    # A link within the directory is the operator's decision.
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
