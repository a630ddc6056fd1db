"""The images of tests and benchmarks: deterministic, and readable by other programs."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import images
from bench.registry import serving
from obdelta.oci import DiffID, Digest, common_prefix, parse_config, parse_manifest
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "images")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path / "registry") as url:
        yield url


def test_the_seed_alone_decides_the_bytes(tmp_path: Path, pair: Pair) -> None:
    again, other = make_pair(tmp_path / "again"), make_pair(tmp_path / "other", seed=2)
    assert again.base.digest == pair.base.digest and again.target.digest == pair.target.digest
    assert not set(other.target.diff_ids[:-1]) & set(pair.target.diff_ids)


def test_the_pair_has_every_kind_of_layer(pair: Pair) -> None:
    assert common_prefix(pair.base.diff_ids, pair.target.diff_ids) == 1
    assert pair.target.diff_ids[4] in pair.base.diff_ids
    assert pair.target.diff_ids[5] == DiffID(
        "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
    )
    assert (len(pair.base.layers), len(pair.target.layers)) == (5, 6)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_layers_are_readable_by_gnu_tar_and_have_the_digests_of_their_names(
    tmp_path: Path, compression: images.Compression
) -> None:
    layer = make_pair(tmp_path, compression=compression).base.layers[0]
    tar = layer.write_tar(tmp_path / "layer.tar")
    assert layer.path.name == layer.digest.hex == Digest.of(layer.path.read_bytes()).hex
    assert (tar.stat().st_size, DiffID.of(tar.read_bytes())) == (layer.tar_size, layer.diff_id)
    listed = subprocess.run(
        ["tar", "-tvf", tar], check=True, capture_output=True, text=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert (
        listed.stderr == ""
        and "bin/cat link to bin/busybox" in listed.stdout
        and "/é" in listed.stdout
    )
    with tarfile.open(tar) as read:
        names = read.getnames()
        assert names.index("usr") < names.index("usr/share") < names.index("usr/share/licence.txt")


def test_a_layer_of_a_tree_unpacks_to_the_same_tree(tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "er" / "program").write_bytes(b"\x7fELF")
    (tree / "deep" / "er" / "program").chmod(0o755)
    (tree / "deep" / "again").hardlink_to(tree / "deep" / "er" / "program")
    (tree / "link").symlink_to("deep/er")
    layer = images.make_layer(
        images.from_tree(tree), tmp_path / "blobs", tar_path=tmp_path / "kept.tar"
    )
    copy.mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "kept.tar", "-C", copy], check=True)
    assert (
        subprocess.run(["diff", "-r", "--no-dereference", tree, copy], check=False).returncode == 0
    )
    assert (copy / "deep" / "again").stat().st_ino == (
        copy / "deep" / "er" / "program"
    ).stat().st_ino
    assert layer.diff_id == DiffID.of((tmp_path / "kept.tar").read_bytes())


def test_content_of_another_length_than_declared_is_refused(tmp_path: Path) -> None:
    entry = images.file("a", b"abc")
    entry.info.size = 4
    with pytest.raises(ValueError, match="3 bytes of content, 4 declared"):
        images.make_layer([entry], tmp_path / "blobs")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_layouts_are_images_for_skopeo(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, format="oci")
    inspected = subprocess.run(
        ["skopeo", "inspect", f"oci:{tmp_path / TARGET_REPOSITORY}:latest"],
        check=True,
        capture_output=True,
    )
    found = json.loads(inspected.stdout)
    assert found["Labels"] == {"release": "2"}
    assert found["Layers"] == [str(layer.digest) for layer in pair.target.layers]
    manifest = parse_manifest(pair.target.manifest, pair.target.media_type)
    assert manifest.digest == pair.target.digest
    assert parse_config(pair.target.config).diff_ids == pair.target.diff_ids


@pytest.mark.parametrize("form", ["docker", "oci"])
def test_pushed_images_are_what_the_registry_gives(
    tmp_path: Path, registry: str, form: images.Format
) -> None:
    pair = make_pair(tmp_path / "images", format=form)
    assert images.push(pair.base, registry, BASE_REPOSITORY, "one") == pair.base.digest
    images.push(pair.target, registry, TARGET_REPOSITORY)
    images.push(pair.target, registry, TARGET_REPOSITORY)  # existing blobs are left alone
    copy = tmp_path / "copy"
    address = f"{registry.removeprefix('http://')}/{TARGET_REPOSITORY}:latest"
    subprocess.run(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{address}", f"dir:{copy}"],
        check=True,
    )
    assert (copy / "manifest.json").read_bytes() == pair.target.manifest
    assert all(
        (copy / layer.digest.hex).read_bytes() == layer.path.read_bytes()
        for layer in pair.target.layers
    )


def test_indexes_are_pushed_with_their_images(tmp_path: Path, registry: str, pair: Pair) -> None:
    layout = pair.root / BASE_REPOSITORY
    arm = images.make_image(pair.base.layers[:2], layout, name="arm", architecture="arm64")
    platforms = [
        (pair.base, {"os": "linux", "architecture": "amd64"}),
        (arm, {"os": "linux", "architecture": "arm64"}),
    ]
    index = images.make_index(platforms, layout, name="both")
    images.push(index, registry, BASE_REPOSITORY)
    address = f"docker://{registry.removeprefix('http://')}/{BASE_REPOSITORY}:both"
    found = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", "--override-arch=arm64", address],
        check=True,
        capture_output=True,
    )
    assert len(json.loads(found.stdout)["Layers"]) == 2


def test_a_push_that_is_refused_says_so(tmp_path: Path, registry: str, pair: Pair) -> None:
    with pytest.raises(images.PushFailed, match="POST /v2/UPPER/blobs/uploads/: status 404"):
        images.push(pair.base, registry, "UPPER")
