"""Devices behind odd registries, caches and storages: the real server, and a double as odd as
those in public bug reports.

Each row has its own images, so that nothing about them is known before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from obdelta.oci.manifest import DOCKER_MANIFEST
from tests.support.delta import tar_of
from tests.support.odd_images import Place, config_of, layers_of, pair, place, put, running, zipped
from tests.support.odd_registry import Handler, odd_registry

__all__ = ["place", "running"]


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
