"""Manifests, indexes and image configs from untrusted bytes: read as engines read them, or refused
by one error.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.errors import ImageUnusable, ManifestInvalid
from obdelta.oci import ImageConfig, Index, Manifest, parse_config, parse_manifest
from obdelta.oci.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_CONFIG,
    MAX_JSON_PARTS,
    OCI_INDEX,
    OCI_MANIFEST,
)

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def descriptor(digest: str = A, media_type: str = OCI_MANIFEST, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": 7, **more}


def platform(architecture: str, os: str = "linux") -> dict[str, str]:
    return {"os": os, "architecture": architecture}


def candidates(*entries: dict[str, Any]) -> list[str]:
    raw = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    index = parse_manifest(raw, OCI_INDEX)
    assert isinstance(index, Index)
    return [str(candidate.digest) for candidate in index.candidates()]


INDEXES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "one image": ([descriptor()], [A]),
    "two platforms": (
        [descriptor(platform=platform("arm64")), descriptor(B, platform=platform("amd64"))],
        [A, B],
    ),
    "the same image twice": ([descriptor(), descriptor()], [A]),
    "the same image for two platforms": (
        [descriptor(platform=platform("arm64")), descriptor(platform=platform("arm"))],
        [A],
    ),
    "one platform twice": (
        [descriptor(platform=platform("arm64")), descriptor(B, platform=platform("arm64"))],
        [A],
    ),
    "two without a platform": ([descriptor(), descriptor(B)], [A, B]),
    "an attestation by its platform": (
        [descriptor(), descriptor(B, platform=platform("unknown", "unknown"))],
        [A],
    ),
    "an attestation by its artifactType": (
        [descriptor(), descriptor(B, artifactType="application/vnd.in-toto+json")],
        [A],
    ),
    "an attestation by its annotation": (
        [
            descriptor(platform=platform("arm64")),
            descriptor(B, annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        ],
        [A],
    ),
    "another media type": (
        [descriptor(B, "application/vnd.cncf.helm.config.v1+json"), descriptor()],
        [A],
    ),
    "an index beside an image": ([descriptor(B, OCI_INDEX), descriptor()], [A]),
    "an index alone": ([descriptor(B, DOCKER_LIST)], [B]),
    "an entry that is not readable": ([descriptor("sha512:" + "a" * 128), descriptor()], [A]),
    "nothing": ([], []),
    "attestations alone": ([descriptor(B, platform=platform("unknown", "unknown"))], []),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_engines_choose_an_image_of_their_platform_from_an_index(kind: str) -> None:
    entries, expected = INDEXES[kind]
    assert candidates(*entries) == expected


def manifest_of(**changes: Any) -> bytes:
    value = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": descriptor(B, DOCKER_CONFIG),
        "layers": [descriptor(C, DOCKER_LAYER)],
        **changes,
    }
    return json.dumps({key: one for key, one in value.items() if one != "absent"}).encode()


MANIFESTS: dict[str, tuple[bytes, str]] = {
    "layers: null": (manifest_of(layers=None), DOCKER_MANIFEST),
    "layers absent": (manifest_of(layers="absent"), DOCKER_MANIFEST),
    "layers: an object": (manifest_of(layers={}), DOCKER_MANIFEST),
    "layers: null in it": (manifest_of(layers=[None]), DOCKER_MANIFEST),
    "config absent": (manifest_of(config="absent"), DOCKER_MANIFEST),
    "config without size": (
        manifest_of(config={"mediaType": DOCKER_CONFIG, "digest": B}),
        DOCKER_MANIFEST,
    ),
    "a size that is no number": (manifest_of(config=descriptor(size="7")), DOCKER_MANIFEST),
    "a size that is true": (manifest_of(config=descriptor(size=True)), DOCKER_MANIFEST),
    "a size that is negative": (manifest_of(config=descriptor(size=-1)), DOCKER_MANIFEST),
    "a size with a fraction": (manifest_of(config=descriptor(size=7.5)), DOCKER_MANIFEST),
    "a size without end": (
        manifest_of().replace(b'"size": 7', b'"size": ' + b"9" * 5000),
        DOCKER_MANIFEST,
    ),
    "sha512": (manifest_of(layers=[descriptor("sha512:" + "a" * 128)]), DOCKER_MANIFEST),
    "a digest in upper case": (manifest_of(layers=[descriptor(A.upper())]), DOCKER_MANIFEST),
    "a media type that is no text": (manifest_of(config=descriptor(media_type=7)), DOCKER_MANIFEST),  # type: ignore[arg-type]
    "a lone surrogate": (manifest_of(config=descriptor(media_type="\ud800")), DOCKER_MANIFEST),
    "schema 1": (
        json.dumps({"schemaVersion": 1, "fsLayers": [{"blobSum": A}], "history": []}).encode(),
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    ),
    "schemaVersion: true": (manifest_of(schemaVersion=True), DOCKER_MANIFEST),
    "an artifact": (
        json.dumps(
            {"mediaType": "application/vnd.oci.artifact.manifest.v1+json", "blobs": []}
        ).encode(),
        "application/vnd.oci.artifact.manifest.v1+json",
    ),
    "HTML": (b"<html><body>Sign in</body></html>", "text/html"),
    "HTML under a manifest's media type": (b"<html>", DOCKER_MANIFEST),
    "no media type": (manifest_of(mediaType="absent"), ""),
    "keys in other case": (manifest_of(layers="absent", Layers=[]), DOCKER_MANIFEST),
    "keys in other case beside the right ones": (manifest_of(LAYERS=[]), DOCKER_MANIFEST),
    "UTF-16": (manifest_of().decode().encode("utf-16"), DOCKER_MANIFEST),
    "a byte order mark": (b"\xef\xbb\xbf" + manifest_of(), DOCKER_MANIFEST),
    "NaN": (manifest_of().replace(b'"size": 7', b'"size": NaN'), DOCKER_MANIFEST),
    "an index without manifests": (b'{"schemaVersion":2,"manifests":null}', OCI_INDEX),
    "an index of something else": (b'{"schemaVersion":2,"manifests":[7,null,{}]}', OCI_INDEX),
    "millions of values": (b"[" + b"0," * MAX_JSON_PARTS + b"0]", OCI_INDEX),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_unreadable_manifest_is_refused(kind: str) -> None:
    raw, content_type = MANIFESTS[kind]
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw, content_type)


def config_of(**changes: Any) -> bytes:
    value = {
        "architecture": "arm64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [A]},
        **changes,
    }
    return json.dumps(value).encode()


CONFIGS = {
    "invalid UTF-8": config_of().replace(b"arm64", b"arm\xff"),
    "invalid UTF-8 in a label": config_of(config={"Labels": {"a": "x"}}).replace(b'"x"', b'"\xc3"'),
    "a surrogate in UTF-8": config_of().replace(b"arm64", b"\xed\xa0\x80"),
    "keys in upper case": config_of().replace(b"rootfs", b"RootFS"),
    "keys in upper case beside the right ones": config_of(Config={"Cmd": ["/bin/sh"]}),
    "a key that Go folds": config_of().replace(b'"os"', '"o\u017f"'.encode()),
    "diff_ids in upper case": config_of().replace(b"diff_ids", b"Diff_IDs"),
    "rootfs: null": config_of(rootfs=None),
    "rootfs: a list": config_of(rootfs=[]),
    "diff_ids: an object": config_of(rootfs={"diff_ids": {}}),
    "diff_ids: a number in it": config_of(rootfs={"diff_ids": [7]}),
    "diff_ids: sha512": config_of(rootfs={"diff_ids": ["sha512:" + "a" * 128]}),
    "config: a number": config_of(config=5),
    "config: a list": config_of(config=[]),
    "config: text": config_of(config=""),
    "labels: a list": config_of(config={"Labels": []}),
    "labels: false": config_of(config={"Labels": False}),
    "labels: a number in them": config_of(config={"Labels": {"a": 7}}),
    "labels in lower case: a list": config_of(config={"labels": []}),
    "labels twice": config_of(config={"Labels": {}, "labels": []}),
    "architecture: a number": config_of(architecture=7),
    "created: a number": config_of(created=7),
    "created: words": config_of(created="yesterday"),
    "not JSON": b"{",
    "a list": b"[]",
    "nothing": b"",
    "too large": b'{"a":"' + b"x" * MAX_CONFIG + b'"}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unreadable_config_is_refused(kind: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_config(CONFIGS[kind])


def test_a_config_of_many_megabytes_is_read() -> None:
    raw = config_of(
        config={"Labels": {"notes": "x" * (20 << 20)}}, created="2023-11-14T22:13:20.123456789Z"
    )
    assert parse_config(raw).raw == raw
    assert parse_config(config_of(created=None, rootfs={"diff_ids": None})).diff_ids == ()


@pytest.mark.parametrize("config", [None, {}, {"Labels": None}, {"Labels": {"a": "b", "c": None}}])
def test_a_config_without_labels_is_read(config: Any) -> None:
    raw = config_of(config=config)
    assert parse_config(raw).raw == raw


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([A, B, OCI_MANIFEST]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "schemaVersion",
                    "mediaType",
                    "config",
                    "layers",
                    "manifests",
                    "digest",
                    "size",
                    "platform",
                    "os",
                    "architecture",
                    "annotations",
                    "artifactType",
                    "rootfs",
                    "diff_ids",
                    "created",
                    "Layers",
                    "type",
                ]
            )
            | st.text(max_size=5),
            children,
            max_size=6,
        )
    ),
    max_leaves=20,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "schemaVersion": st.just(2) | JSON,
        "mediaType": st.sampled_from([DOCKER_MANIFEST, OCI_MANIFEST, OCI_INDEX, DOCKER_LIST])
        | JSON,
        "config": JSON | st.just(descriptor(B, DOCKER_CONFIG)),
        "layers": JSON | st.lists(JSON | st.just(descriptor(C)), max_size=3),
        "manifests": JSON | st.lists(JSON | st.just(descriptor()), max_size=3),
        "rootfs": JSON | st.fixed_dictionaries({"diff_ids": JSON | st.just([A])}),
        "architecture": JSON,
        "os": JSON,
        "created": JSON,
    },
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@given(
    value=FIELDS | JSON,
    content_type=st.sampled_from([DOCKER_MANIFEST, OCI_INDEX, "", "text/html; charset=x"]),
)
def test_any_json_is_a_manifest_or_unusable(value: Any, content_type: str) -> None:
    try:
        found = parse_manifest(encoded(value), content_type)
    except ImageUnusable:
        return
    assert isinstance(found, Manifest | Index)
    if isinstance(found, Index):
        assert len({entry.digest for entry in found.candidates()}) == len(found.candidates())
    else:
        assert all(
            re.fullmatch("[ -~]*", layer.media_type) for layer in (found.config, *found.layers)
        )


@given(value=FIELDS | JSON)
def test_any_json_is_a_config_or_unusable(value: Any) -> None:
    try:
        found = parse_config(encoded(value))
    except ImageUnusable:
        return
    assert isinstance(found, ImageConfig)


@given(
    raw=st.binary(max_size=200)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_refused_by_the_same_error(raw: bytes) -> None:
    for parse in (parse_config, lambda raw: parse_manifest(raw, DOCKER_MANIFEST)):
        with pytest.raises(ImageUnusable):
            parse(raw)
