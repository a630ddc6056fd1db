"""The delta image's config and manifest."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import Any

import pytest

from obdelta.delta.build import DeltaLayer
from obdelta.delta.image import EMPTY_LAYER, EMPTY_LAYER_BYTES, EMPTY_LAYER_DIFF_ID, compose
from obdelta.errors import ManifestInvalid
from obdelta.oci import DiffID, Digest, ImageConfig, Manifest, parse_config, parse_manifest


def config(*layers: str, **more: Any) -> ImageConfig:
    value = {"architecture": "arm64", "os": "linux", "variant": "v8", "created": "2026-01-02T03:04:05Z"} | more
    value["rootfs"] = {"type": "layers", "diff_ids": [str(DiffID.of(layer.encode())) for layer in layers]}
    return parse_config(json.dumps(value, ensure_ascii=False, indent=1).encode())


def delta(target: str) -> DeltaLayer:
    tar = f"delta to {target}".encode()
    return DeltaLayer(Digest.of(b"gz" + tar), 99, DiffID.of(tar), 2048, DiffID.of(target.encode()), 0, 0, 0, 0, {})


BASE = config("a", "b", "c")


def test_the_empty_layer_is_the_one_that_engines_know() -> None:
    assert Digest.of(EMPTY_LAYER_BYTES) == EMPTY_LAYER.digest
    assert str(EMPTY_LAYER.digest) == "sha256:4f4fb700ef54461cfa02571ae0db9a0dc1e0cdb5577484a6d75e68dc38e8acc1"
    assert len(EMPTY_LAYER_BYTES) == EMPTY_LAYER.size == 32
    assert gzip.decompress(EMPTY_LAYER_BYTES) == bytes(1024)
    assert DiffID.of(bytes(1024)) == EMPTY_LAYER_DIFF_ID


def test_composed() -> None:
    target = config("a", "b", "d", "c", config={"Env": ['ä=\U0001f600 \\u0000 "quoted"\n']})
    image = compose(BASE, target, [delta("d"), delta("c")])
    manifest = parse_manifest(image.manifest, image.media_type)
    assert isinstance(manifest, Manifest)
    assert image.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    assert image.manifest_digest == manifest.digest == Digest.of(image.manifest)
    assert manifest.config == image.config_descriptor
    assert (manifest.config.digest, manifest.config.size) == (Digest.of(image.config), len(image.config))
    assert manifest.layers[:2] == (EMPTY_LAYER, EMPTY_LAYER)
    assert [(layer.digest, layer.size) for layer in manifest.layers[2:]] == [
        (delta("d").digest, 99),
        (delta("c").digest, 99),
    ]
    made = parse_config(image.config)
    assert made.diff_ids == (EMPTY_LAYER_DIFF_ID, EMPTY_LAYER_DIFF_ID, delta("d").diff_id, delta("c").diff_id)
    labels = made.value["config"]["Labels"]
    assert labels["io.resin.delta.base"] == str(BASE.image_id)
    assert labels["io.resin.delta.config"].encode() == target.raw
    assert hashlib.sha256(labels["io.resin.delta.config"].encode()).hexdigest() == target.image_id.hex
    assert {name: made.value[name] for name in ("architecture", "os", "variant", "created")} == {
        "architecture": "arm64", "os": "linux", "variant": "v8", "created": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    assert len(made.value["history"]) == 4
    assert compose(BASE, target, [delta("d"), delta("c")]) == image


def test_same_layers_other_config() -> None:
    """Only the config differs: nothing but empty layers."""
    target = config("a", "b", "c", config={"Cmd": ["x"]})
    manifest = parse_manifest(compose(BASE, target, []).manifest, "")
    assert isinstance(manifest, Manifest)
    assert manifest.layers == (EMPTY_LAYER,) * 3


def test_what_a_config_lacks_is_there() -> None:
    raw = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}}).encode()
    made = parse_config(compose(BASE, parse_config(raw), []).config)
    assert (made.value["architecture"], made.value["os"]) == ("amd64", "linux")
    assert made.value["created"] == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "text", ['{"rootfs":{},"x":"\\ud800"}', '  {"rootfs":{}}\n', '{"rootfs":{},"rootfs":{},"x":"\\u00e4"}']
)
def test_raw_bytes_survive(text: str) -> None:
    """Escapes, blanks and doubled keys are the target's own: the string has them as they are."""
    target = parse_config(text.encode())
    labels = parse_config(compose(BASE, target, []).config).value["config"]["Labels"]
    assert labels["io.resin.delta.config"].encode() == target.raw


def test_refused() -> None:
    utf16 = parse_config('{"rootfs":{"type":"layers"}}'.encode("utf-16"))
    with pytest.raises(ManifestInvalid, match="not UTF-8"):
        compose(BASE, utf16, [])
    for layers in ([], [delta("d"), delta("d")], [delta("c"), delta("d")]):
        with pytest.raises(ManifestInvalid, match="do not lead"):
            compose(BASE, config("a", "d", "c"), layers)
