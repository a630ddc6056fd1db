"""The number of pushes at a time.

The registry is a double; a real one is in tests/server/test_publish.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock

from bench.images import make_image
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.publish.registry_publisher import RegistryPublisher
from obdelta.builds.publish.registry_pushes import MAX_PUSHES, PushParts
from obdelta.builds.types import Pair, Published
from obdelta.errors import UpstreamUnavailable
from obdelta.oci import Manifest, parse_manifest
from obdelta.registry import Credentials
from obdelta.registry.upload import PushResult


class Around:
    """Pusher, blob store and catalogue in one: the test ends pushes."""

    def __init__(self, manifest: Manifest) -> None:
        self.pushes: list[Deferred[PushResult]] = []
        self.counters = self
        self._manifest = SimpleNamespace(raw=manifest.raw, media_type=manifest.media_type)

    async def push(self, *_: object, **__: object) -> PushResult:
        self.pushes.append(Deferred())
        return await self.pushes[-1]

    async def manifest(self, *_: object) -> Any:
        return self._manifest

    async def count(self, _: str) -> None:
        """Counts nothing."""

    def pin(self, _: object) -> Any:
        return nullcontext()

    def path(self, _: object) -> None:
        """Reads nothing."""


@pytest_twisted.ensureDeferred
async def test_pushes_are_limited_and_the_next_starts_when_one_ends(tmp_path: Path) -> None:
    images = [make_image([], tmp_path / name, labels={"release": name}) for name in ("a", "b")]
    manifests = [parse_manifest(image.manifest, image.media_type) for image in images]
    base, target = (manifest for manifest in manifests if isinstance(manifest, Manifest))
    around: Any = Around(target)
    parts = PushParts(
        upstream=around,
        pusher=around,
        credentials=Credentials.anonymous(),
        blobs=around,
        catalogue=around,
        clock=Clock(),
    )
    publisher = RegistryPublisher(parts, host="registry.example.com")
    row: Any = SimpleNamespace(
        content=target.digest, target_repository="v2/0", full_bytes=2, delta_bytes=1
    )
    pairs = [
        Pair("v3", 1, ResolvedImage(f"v2/{number:032x}", base), ResolvedImage("v2/0", target))
        for number in range(MAX_PUSHES + 2)
    ]
    waits = [ensureDeferred(publisher.publish(pair, row, 60.0)) for pair in pairs]
    assert len(around.pushes) == MAX_PUSHES
    around.pushes[0].callback(PushResult())
    assert isinstance(await waits[0], Published) and len(around.pushes) == MAX_PUSHES + 1
    # A push that fails frees its slot too, and so does the end of the server.
    around.pushes[1].errback(UpstreamUnavailable("it is away"))
    assert await waits[1] is None and len(around.pushes) == MAX_PUSHES + 2
    await publisher.close()
    assert [await wait for wait in waits[2:]] == [None] * MAX_PUSHES
