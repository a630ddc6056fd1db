"""The delta image's config and manifest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from obdelta.delta.build import DeltaLayer
from obdelta.delta.image import compose, config_size
from obdelta.errors import ManifestInvalid
from obdelta.oci import (
    DiffID,
    Digest,
    Form,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest,
)


def config(*layers: str, **more: Any) -> ImageConfig:
    value = {
        "architecture": "arm64",
        "os": "linux",
        "variant": "v8",
        "created": "2026-01-02T03:04:05Z",
    } | more
    value["rootfs"] = {
        "type": "layers",
        "diff_ids": [str(DiffID.of(layer.encode())) for layer in layers],
    }
    return parse_config(json.dumps(value, ensure_ascii=False, indent=1).encode())


def delta(target: str) -> DeltaLayer:
    tar = f"delta to {target}".encode()
    return DeltaLayer(
        Digest.of(b"gz" + tar), 99, DiffID.of(tar), 2048, DiffID.of(target.encode()), 0, 0, 0, 0, {}
    )


BASE = config("a", "b", "c")


def test_a_delta_image_is_composed() -> None:
    target = config("a", "b", "d", "c", config={"Env": ['ä=\U0001f600 \\u0000 "quoted"\n']})
    layers = [delta(layer) for layer in "abdc"]
    image = compose(BASE, target, layers)
    manifest = parse_manifest(image.manifest, image.media_type)
    assert isinstance(manifest, Manifest)
    assert image.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest.digest == Digest.of(image.manifest)
    assert manifest.config == image.config_descriptor
    assert (manifest.config.digest, manifest.config.size) == (
        Digest.of(image.config),
        len(image.config),
    )
    assert [(layer.digest, layer.size) for layer in manifest.layers] == [
        (layer.digest, 99) for layer in layers
    ]
    made = parse_config(image.config)
    assert made.diff_ids == tuple(layer.diff_id for layer in layers)
    labels = made.value["config"]["Labels"]
    assert labels["io.resin.delta.base"] == str(BASE.image_id)
    assert labels["io.resin.delta.config"].encode() == target.raw
    assert (
        hashlib.sha256(labels["io.resin.delta.config"].encode()).hexdigest() == target.image_id.hex
    )
    assert {name: made.value[name] for name in ("architecture", "os", "variant", "created")} == {
        "architecture": "arm64",
        "os": "linux",
        "variant": "v8",
        "created": "2026-01-02T03:04:05Z",
    }
    assert len(made.value["history"]) == 4
    assert compose(BASE, target, layers) == image
    assert config_size(BASE, target) == len(image.config)


def test_missing_fields_of_a_config_are_added() -> None:
    raw = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}}).encode()
    made = parse_config(compose(BASE, parse_config(raw), []).config)
    assert (made.value["architecture"], made.value["os"]) == ("amd64", "linux")
    assert made.value["created"] == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "text",
    ['{"rootfs":{},"x":"\\ud800"}', '  {"rootfs":{}}\n', '{"rootfs":{},"rootfs":{},"x":"\\u00e4"}'],
)
def test_the_targets_config_keeps_its_raw_bytes(text: str) -> None:
    """The string keeps escapes, blanks and duplicate keys of the target."""
    target = parse_config(text.encode())
    labels = parse_config(compose(BASE, target, []).config).value["config"]["Labels"]
    assert labels["io.resin.delta.config"].encode() == target.raw


def test_unusable_images_are_refused() -> None:
    latin1 = replace(config(), raw=b'{"author": "\xe4"}')
    with pytest.raises(ManifestInvalid, match="not UTF-8"):
        compose(BASE, latin1, [])
    for layers in ("", "dc", "add", "acd", "adcc"):
        with pytest.raises(ManifestInvalid, match="do not lead"):
            compose(BASE, config("a", "d", "c"), [delta(layer) for layer in layers])


def test_the_zstd_form_has_oci_types_and_gzipped_copies() -> None:
    target = config("a", "d")
    layers = [delta(layer) for layer in "ad"]
    gzip, zstd = (compose(BASE, target, layers, form, copies=1) for form in Form)
    assert gzip.config == zstd.config
    manifest = parse_manifest(zstd.manifest, "")
    assert isinstance(manifest, Manifest)
    oci = "application/vnd.oci.image"
    assert (manifest.media_type, manifest.config.media_type) == (
        f"{oci}.manifest.v1+json",
        f"{oci}.config.v1+json",
    )
    assert [layer.media_type for layer in manifest.layers] == [
        f"{oci}.layer.v1.tar+gzip",
        f"{oci}.layer.v1.tar+zstd",
    ]
