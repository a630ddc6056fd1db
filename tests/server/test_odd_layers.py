"""Odd layers, indexes and answers of registries: the real server, and an odd double."""

from __future__ import annotations

import bz2
import gzip
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

import pytest
import zstandard

from obdelta.oci.manifest import DOCKER_MANIFEST, OCI_INDEX
from tests.support.odd_images import (
    Packed,
    Place,
    config_of,
    get,
    layers_of,
    noise,
    pair,
    place,
    put,
    running,
    zipped,
)
from tests.support.odd_registry import Handler, digest_of

__all__ = ["place", "running"]


def skippable(content: bytes = b"seek") -> bytes:
    return b"\x52\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


PACKED: dict[str, Packed] = {
    "plain": bytes,
    "zstd": zstandard.compress,
    "a skippable zstd frame first": lambda tar: skippable() + zstandard.compress(tar),
    "an empty skippable frame first": lambda tar: (
        skippable(b"") + zstandard.compress(tar) + skippable(b"index" * 9)
    ),
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("kind", PACKED)
def test_compressions_that_engines_read(place: Place, kind: str) -> None:
    place.delta(*pair(place, kind, pack=PACKED[kind]))
    place.delta(
        put(place, (kind, 1), base=(kind, "base"), pack=PACKED[kind]),
        put(place, (kind, 2), base=(kind, "base")),
    )


@pytest.mark.parametrize(
    ("blob", "where"),
    [
        (b"", "target"),
        (b"", "base"),
        (b"", "below"),
        (gzip.compress(b"", mtime=0), "both"),
        (gzip.compress(b"", mtime=0), "target"),
        (skippable(), "both"),
    ],
)
def test_an_empty_layer(place: Place, blob: bytes, where: str) -> None:
    names = []
    for number in (1, 2):
        tars = layers_of((blob, where, number), base=(blob, where))
        blobs = [zipped(tar) for tar in tars]
        if where == "below" or where == "both" or where == ("base", "target")[number - 1]:
            at = 0 if where == "below" else 2
            tars.insert(at, b"")
            blobs.insert(at, blob)
        names.append(place.repository())
        place.registry.put(names[-1], config_of(*tars), blobs)
    place.delta(*names)


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
def test_bodies_without_a_length_end_with_the_connection(place: Place, version: str) -> None:
    def odd(request: Handler) -> bool:
        found = place.registry.manifests.get(
            (
                request.path.removeprefix("/v2/").partition("/manifests/")[0],
                request.path.rpartition("/")[2],
            )
        )
        if found is not None:
            request.close_delimited(found[1], version=version, content_type=found[0])
        elif (blob := place.registry.blobs.get(request.path.rpartition("/")[2])) is not None:
            request.close_delimited(blob, version=version)
        else:
            return False
        return True

    place.registry.odd = odd
    base, target = pair(place, ("closing", version))
    place.delta(base, target)
    for path in list(place.registry.manifests):
        if path[0] == target:
            status, headers, body = get(f"{place.server.url}/v2/{target}/manifests/{path[1]}")
            assert (status, body) == (200, place.registry.manifests[path][1])
            assert headers["content-type"] == DOCKER_MANIFEST
    for blob in json.loads(place.registry.manifests[target, "latest"][1])["layers"]:
        status, _, body = get(f"{place.server.url}/v2/{target}/blobs/{blob['digest']}")
        assert (status, digest_of(body)) == (200, blob["digest"])


def descriptor(
    digest: str, raw: bytes, media_type: str = DOCKER_MANIFEST, **more: Any
) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": len(raw), **more}


def index_of(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


@pytest.mark.parametrize("kind", ["artifactType", "twice", "nested", "nested beside it"])
def test_indexes_around_one_image(place: Place, kind: str) -> None:
    base, target = pair(place, ("index", kind))
    raw = place.registry.manifests[target, "latest"][1]
    image = descriptor(digest_of(raw), raw)
    other = index_of(descriptor(digest_of(b"unknown"), b"unknown"))
    place.registry.put_manifest(target, other, OCI_INDEX, "other")
    entries = {
        "artifactType": [
            image,
            descriptor(digest_of(b"sbom"), b"sbom", artifactType="application/vnd.in-toto+json"),
        ],
        "twice": [image, image],
        "nested": [
            descriptor(
                place.registry.put_manifest(target, index_of(image), OCI_INDEX, "inner"),
                raw,
                OCI_INDEX,
            )
        ],
        "nested beside it": [descriptor(digest_of(other), other, OCI_INDEX), image],
    }[kind]
    place.registry.put_manifest(target, index_of(*entries), OCI_INDEX)
    status, name = place.ask(base, target)
    assert (status, name.partition(":")[2][:6]) == (200, "delta-"), name


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "/manifests/sha256:"),
        (b'{"schemaVersion": 2, "lay', "/manifests/sha256:"),
        (b"", "/blobs/"),
        (b"<html>try later</html>", "/blobs/"),
    ],
)
def test_a_cache_that_answers_200_with_something_else(place: Place, body: bytes, part: str) -> None:
    base, target = pair(place, ("cache", body, part))
    digest = digest_of(place.registry.manifests[target, "latest"][1])
    refused: set[str] = set()

    def once(request: Handler) -> bool:
        if part not in request.path or request.command == "HEAD" or request.path in refused:
            return False
        refused.add(request.path)
        request.reply(200, body)
        return True

    place.registry.odd = once
    status, name = place.ask(base, f"{target}@{digest}")
    assert (status, name.partition(":")[2][:6]) == (200, "delta-"), name
    assert refused
    # If it stays, it is an upstream error, and nothing about the image is remembered.
    base, target = pair(place, ("for good", body, part))
    digest = digest_of(place.registry.manifests[target, "latest"][1])
    place.registry.odd = replaced(part, body)
    assert place.ask(base, f"{target}@{digest}")[0] in (502, 504)
    place.registry.odd = None
    status, name = place.ask(base, f"{target}@{digest}")
    assert (status, name.partition(":")[2][:6]) == (200, "delta-"), name


def test_a_config_of_many_megabytes(place: Place) -> None:
    history = [{"created_by": f"{number} {noise(number, 500).hex()}"} for number in range(9000)]
    base, target = pair(place, "config", history=history)
    assert len(max(place.registry.blobs.values(), key=len)) > 8 << 20
    place.delta(base, target)


def replaced(part: str, body: bytes) -> Callable[[Handler], bool]:
    """Answers requests whose path contains ``part`` with another body, and status 200."""

    def odd(request: Handler) -> bool:
        if part not in request.path:
            return False
        request.reply(200, body, content_type=DOCKER_MANIFEST)
        return True

    return odd


@pytest.mark.parametrize("size", [0, 100, 60_000, 2_000_000])
def test_a_blob_or_manifest_with_a_wrong_digest_is_cut(place: Place, size: int) -> None:
    repository = put(place, ("cut", size), base=("cut", size))
    manifest = place.registry.manifests[repository, "latest"][1]
    blob = json.loads(manifest)["layers"][0]["digest"]
    for path in (f"blobs/{blob}", f"manifests/{digest_of(manifest)}"):
        place.registry.odd = replaced(path, noise(("other", size), size))
        try:
            status, _, _ = get(f"{place.server.url}/v2/{repository}/{path}")
        except (urllib.error.URLError, ConnectionError, HTTPException):
            continue  # cut before its end
        assert status == 502 or size == 0, "another body came as if it were whole"
