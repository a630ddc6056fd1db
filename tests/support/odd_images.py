"""A server in front of a registry that is as odd as those in public bug reports."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.delta import File, tar_of
from tests.support.odd_registry import OddRegistry, digest_of, odd_registry
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
