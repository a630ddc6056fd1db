"""How many pushes are under way at a time. The registry is the test's own here; a real one is in
tests/server/test_publish.py.
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
from obdelta.builds.registry_publisher import MOST_PUSHES, RegistryPublisher
from obdelta.builds.service import Published
from obdelta.builds.types import Pair
from obdelta.errors import UpstreamUnavailable
from obdelta.oci import Manifest, parse_manifest
from obdelta.registry import Credentials
from obdelta.registry.upload import Pushed


class Around:
    """Pusher, blob store and catalogue in one: pushes end when the test says so."""

    def __init__(self, manifest: Manifest) -> None:
        self.pushes: list[Deferred[Pushed]] = []
        self._manifest = SimpleNamespace(raw=manifest.raw, media_type=manifest.media_type)

    async def push(self, *_: object, **__: object) -> Pushed:
        self.pushes.append(Deferred())
        return await self.pushes[-1]

    async def manifest(self, *_: object) -> Any:
        return self._manifest

    async def count(self, _: str) -> None:
        """Nothing is counted."""

    def pin(self, _: object) -> Any:
        return nullcontext()

    def path(self, _: object) -> None:
        """Nothing is read."""


@pytest_twisted.ensureDeferred
async def test_so_many_pushes_at_once_and_the_next_when_one_has_ended(tmp_path: Path) -> None:
    images = [make_image([], tmp_path / name, labels={"release": name}) for name in ("a", "b")]
    manifests = [parse_manifest(image.manifest, image.media_type) for image in images]
    base, target = (manifest for manifest in manifests if isinstance(manifest, Manifest))
    around: Any = Around(target)
    publisher = RegistryPublisher(
        upstream=around,
        pusher=around,
        credentials=Credentials.anonymous(),
        host="registry.example.com",
        blobs=around,
        catalogue=around,
        clock=Clock(),
    )
    row: Any = SimpleNamespace(
        content=target.digest, target_repository="v2/0", full_bytes=2, delta_bytes=1
    )
    pairs = [
        Pair("v3", 1, ResolvedImage(f"v2/{number:032x}", base), ResolvedImage("v2/0", target))
        for number in range(MOST_PUSHES + 2)
    ]
    waits = [ensureDeferred(publisher.publish(pair, row, 60.0)) for pair in pairs]
    assert len(around.pushes) == MOST_PUSHES
    around.pushes[0].callback(Pushed())
    assert isinstance(await waits[0], Published) and len(around.pushes) == MOST_PUSHES + 1
    # A push that fails gives its place back too, and so does the end of the server.
    around.pushes[1].errback(UpstreamUnavailable("it is away"))
    assert await waits[1] is None and len(around.pushes) == MOST_PUSHES + 2
    await publisher.close()
    assert [await wait for wait in waits[2:]] == [None] * MOST_PUSHES
