"""Devices behind odd registries, caches and storages: the real server, and a double as odd as
those in public bug reports.

Each row has its own images, so that nothing about them is known before.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any

import pytest
import zstandard

from obdelta.oci.manifest import DOCKER_MANIFEST, OCI_INDEX
from tests.support.delta import File, tar_of
from tests.support.odd_registry import Handler, OddRegistry, digest_of, odd_registry
from tests.support.server import RunningServer, running_server

_NUMBERS = itertools.count()


def noise(seed: object, size: int = 60_000) -> bytes:
    return hashlib.shake_128(repr(seed).encode()).digest(size)


class Place:
    """The server and its registry. ``repository()`` makes names that were not used before."""

    def __init__(self, registry: OddRegistry, server: RunningServer) -> None:
        self.registry, self.server = registry, server

    def repository(self) -> str:
        return f"v2/{next(_NUMBERS):032x}"

    def ask(self, base: str, target: str, version: int = 3) -> tuple[int, str]:
        """Returns the status, and the name (v3) or the Location (v2) in the answer to a device's
        first request.
        """
        host = self.server.host
        url = f"{self.server.url}/api/v{version}/delta?src={host}/{base}&dest={host}/{target}"
        status, headers, body = get(url)
        if status == 200:
            return status, json.loads(body)["name"].removeprefix(f"{host}/")
        return status, headers.get("location", body.decode())

    def delta(self, base: str, target: str) -> None:
        """Asserts that the first request is answered with a delta, v3 and v2."""
        status, name = self.ask(base, target)
        assert (status, name.partition(":")[2][:6]) == (200, "delta-"), name
        manifest = json.loads(
            get(f"{self.server.url}/v2/{target}/manifests/{name.partition(':')[2]}")[2]
        )
        for part in (manifest["config"], *manifest["layers"]):
            status, _, body = get(f"{self.server.url}/v2/{target}/blobs/{part['digest']}")
            assert (status, digest_of(body), len(body)) == (200, part["digest"], part["size"])
        status, where = self.ask(base, target, 2)
        assert status == 300 and "full-pull" not in where, where


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=90) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with (
        odd_registry() as registry,
        running_server(
            tmp_path_factory.mktemp("odd") / "state",
            upstream=registry.url,
            upstream_credentials="none",
            max_delta_ratio="10",
            request_timeout="12",
        ) as server,
    ):
        yield Place(registry, server)
        assert "Traceback" not in server.log


@pytest.fixture
def place(running: Place) -> Iterator[Place]:
    running.registry.odd = None
    running.registry.seen.clear()
    yield running
    running.registry.odd = None


def config_of(*tars: bytes, **more: Any) -> bytes:
    return json.dumps(
        {
            "architecture": "arm64",
            "os": "linux",
            "config": {"Cmd": ["/app"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
            **more,
        }
    ).encode()


def layers_of(seed: object, *, base: object = None) -> list[bytes]:
    """Returns two layers as tars: images of the same ``base`` share one, the other is unique."""
    shared = tar_of([File("lib/shared", noise(("shared", base)))])
    own = noise(("own", base)) + noise(seed, 3000)
    return [shared, tar_of([File("app/main", own)])]


def zipped(tar: bytes) -> bytes:
    """Compresses to the same bytes every time: equal layers have equal blobs."""
    return gzip.compress(tar, mtime=0)


Packed = Callable[[bytes], bytes]


def put(
    place: Place,
    seed: object,
    *,
    base: object,
    pack: Packed = zipped,
    change: Callable[[dict[str, Any]], None] = lambda manifest: None,
    **config: Any,
) -> str:
    repository = place.repository()
    tars = layers_of(seed, base=base)
    place.registry.put(
        repository, config_of(*tars, **config), [pack(tar) for tar in tars], change=change
    )
    return repository


def pair(place: Place, kind: object, **target: Any) -> tuple[str, str]:
    return put(place, (kind, 1), base=kind), put(place, (kind, 2), base=kind, **target)


# -- rows 1 and 2: HEAD ------------------------------------------------------------------------


def on_head(answer: Callable[[Handler], None]) -> Callable[[Handler], bool]:
    def odd(request: Handler) -> bool:
        if request.command != "HEAD" or "/blobs/" not in request.path:
            return False
        answer(request)
        return True

    return odd


@pytest.mark.parametrize("status", [400, 405, 501])
def test_deltas_are_built_where_head_is_refused(place: Place, status: int) -> None:
    place.registry.odd = on_head(lambda request: request.reply(status))
    base, target = pair(place, ("head", status))
    place.delta(base, target)
    place.registry.seen.clear()
    place.delta(base, put(place, ("head", status, 3), base=("head", status)))
    assert any(seen.method == "HEAD" for seen in place.registry.seen)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 501])
def test_deltas_are_built_where_signed_storage_takes_only_get(place: Place, status: int) -> None:
    with odd_registry() as storage:
        storage.blobs = place.registry.blobs
        storage.odd = on_head(lambda request: request.reply(status))

        def odd(request: Handler) -> bool:
            if "/blobs/" not in request.path:
                return False
            request.reply(307, location=f"{storage.url}/blobs/{request.path.rpartition('/')[2]}")
            return True

        place.registry.odd = odd
        base, target = pair(place, ("signed", status))
        place.delta(base, target)
        place.delta(base, put(place, ("signed", status, 3), base=("signed", status)))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_fault_of_a_head_request_is_retried(place: Place, status: int) -> None:
    base, target = pair(place, ("passing", status))
    place.delta(base, target)
    failed: set[str] = set()

    def once(request: Handler) -> None:
        if request.path in failed:
            request.plain()
        else:
            failed.add(request.path)
            request.reply(status)

    place.registry.odd = on_head(once)
    place.delta(put(place, ("passing", status, 3), base=("passing", status)), target)
    assert failed


# -- row 3: sizes ------------------------------------------------------------------------------


def off_by(difference: int, *parts: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for part in parts:
            (manifest["config"] if part < 0 else manifest["layers"][part])["size"] += difference

    return change


@pytest.mark.parametrize(
    ("difference", "parts"),
    [(-1, (-1, 0, 1)), (1, (-1, 0, 1)), (1, (-1,)), (-1, (0,)), (700, (1,))],
)
@pytest.mark.parametrize("base_too", [False, True])
def test_wrong_sizes_in_manifests_are_tolerated(
    place: Place, difference: int, parts: tuple[int, ...], base_too: bool
) -> None:
    kind, change = ("size", difference, parts, base_too), off_by(difference, *parts)
    if base_too:
        place.delta(
            put(place, (kind, 1), base=kind, change=change), put(place, (kind, 2), base=kind)
        )
    else:
        place.delta(*pair(place, kind, change=change))


# -- rows 4 and 9: manifests and configs that cannot be read -----------------------------------


def broken(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields of a manifest; None removes one."""

    def change(manifest: dict[str, Any]) -> None:
        for name, value in changes.items():
            if value is None:
                del manifest[name]
            else:
                manifest[name] = value

    return change


def without_size(manifest: dict[str, Any]) -> None:
    del manifest["config"]["size"]


def with_sha512(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["digest"] = "sha512:" + "a" * 128


def layers_null(manifest: dict[str, Any]) -> None:
    manifest["layers"] = None


UNREADABLE: dict[str, Callable[[dict[str, Any]], None]] = {
    "layers: null": layers_null,
    "layers absent": broken(layers=None),
    "config without size": without_size,
    "sha512": with_sha512,
    "schema 1": broken(
        schemaVersion=1, mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws"
    ),
    "an artifact": broken(mediaType="application/vnd.oci.artifact.manifest.v1+json"),
}


def full_pull(place: Place, base: str, target: str) -> None:
    """Asserts that the first request, v3 and v2, is answered with the target itself, and that this
    is no failure.
    """
    before = len(place.server.log)
    assert place.ask(base, target) == (200, target)
    status, where = place.ask(base, target, 2)
    assert status == 300 and "full-pull" in where, where
    lines = place.server.log[before:]
    assert "#warn" not in lines and "#error" not in lines and "Traceback" not in lines, lines


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_base_leads_to_a_full_pull(place: Place, kind: str) -> None:
    base, target = (
        put(place, (kind, 1), base=kind, change=UNREADABLE[kind]),
        put(place, (kind, 2), base=kind),
    )
    full_pull(place, base, target)


@pytest.mark.parametrize("media_type", ["text/html", DOCKER_MANIFEST])
@pytest.mark.parametrize("by_digest", [False, True])
def test_a_base_that_is_an_html_page_leads_to_a_full_pull(
    place: Place, media_type: str, by_digest: bool
) -> None:
    page = b"<html><body>Sign in</body></html>"
    base, target = place.repository(), put(place, (media_type, by_digest), base="page")
    digest = place.registry.put_manifest(base, page, media_type)
    full_pull(place, f"{base}@{digest}" if by_digest else base, target)


CONFIGS: dict[str, Callable[[bytes], bytes]] = {
    "invalid UTF-8": lambda raw: raw.replace(b"arm64", b"arm\xff4"),
    "upper-case keys": (
        lambda raw: raw.replace(b"rootfs", b"ROOTFS").replace(b"diff_ids", b"DIFF_IDS")
    ),
    "not JSON": lambda raw: raw[:-1],
    "a list": lambda raw: b"[" + raw + b"]",
    "diff_ids for other layers": lambda raw: raw.replace(b"sha256:", b"sha512:"),
    "over 64 MiB": lambda raw: raw[:-1] + b" " * (64 << 20) + b"}",
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("where", ["base", "target"])
def test_an_unreadable_config_leads_to_a_full_pull(place: Place, kind: str, where: str) -> None:
    other = put(place, (kind, where, 1), base=(kind, where))
    tars = layers_of((kind, where, 2), base=(kind, where))
    repository = place.repository()
    place.registry.put(repository, CONFIGS[kind](config_of(*tars)), [zipped(tar) for tar in tars])
    full_pull(place, *((repository, other) if where == "base" else (other, repository)))


@pytest.mark.parametrize(
    "blob", [b"\xfd7zXZ\0 and more", zipped(b"no tar" * 200), zipped(tar_of([]))[:-9]]
)
def test_an_unreadable_layer_leads_to_a_full_pull(place: Place, blob: bytes) -> None:
    base, target = put(place, (blob, 1), base=blob), place.repository()
    tars = [*layers_of((blob, 2), base=blob), b"never seen"]
    place.registry.put(target, config_of(*tars), [*map(zipped, tars[:2]), blob])
    full_pull(place, base, target)


# -- rows 5, 6, 9: layers ----------------------------------------------------------------------


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


# -- row 7: bodies without a length ------------------------------------------------------------


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


# -- row 10: indexes ---------------------------------------------------------------------------


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


# -- row 12: 200 with something else -----------------------------------------------------------


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


# -- row 13: configs ---------------------------------------------------------------------------


def test_a_config_of_many_megabytes(place: Place) -> None:
    history = [{"created_by": f"{number} {noise(number, 500).hex()}"} for number in range(9000)]
    base, target = pair(place, "config", history=history)
    assert len(max(place.registry.blobs.values(), key=len)) > 8 << 20
    place.delta(base, target)


# -- what else devices get ---------------------------------------------------------------------


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
