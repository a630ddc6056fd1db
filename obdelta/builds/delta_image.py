"""A finished v3 delta, whoever built it, into the store and the catalogue."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReactorTime

from obdelta.builds.concurrent import first_failure, settle
from obdelta.builds.pair import NotWorth, Pair
from obdelta.delta.image import EMPTY_LAYER_BYTES, MadeLayer, compose
from obdelta.oci import DiffID, Digest, ImageConfig, Manifest, parse_manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.rows import DeltaKey, DeltaRow


def delta_tag(key: DeltaKey) -> str:
    """``delta-<16 hex>``: a name for the contents of both images and the recipe, so that it never means anything else."""
    text = f"{key.kind} {key.recipe} {key.base} {key.target}"
    return f"delta-{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}"


class DeltaImages:
    """Publishes delta images; ``worth`` is the setting of that name."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        blobs: BlobStore,
        catalogue: Catalogue,
        worth: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._blobs, self._catalogue, self._worth = clock, blobs, catalogue, worth
        self._now = now

    async def publish(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        common: int,
        results: Sequence[Mapping[str, Any]],
        started: float,
        *,
        whatever: bool = False,
        **details: Any,
    ) -> DeltaRow:
        """Makes an image of the proven layers behind the ``common`` ones, bottom to top, and publishes it.

        ``results`` are what workers answer for each (``path``, ``digest``, ``size``, ``diff_id``, ``target`` and more, which
        goes into the row's details); their files are taken over. ``started`` by the clock; ``whatever``
        it is worth, it is wanted. Raises NotWorth, StoreFull.
        """
        layers = [
            MadeLayer(
                Digest.parse(result["digest"]),
                result["size"],
                DiffID.parse(result["diff_id"]),
                DiffID.parse(result["target"]),
            )
            for result in results
        ]
        # In a thread: configs may have many megabytes.
        image = await self._blobs.threads.run(compose, base, target, layers)
        manifest = parse_manifest(image.manifest, DOCKER_MANIFEST)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was composed is the manifest of one image")
        # Of a layer that the base has too only the base's blob was fetched: what the target's manifest says of its size is
        # nobody's knowledge, and figures made of it would go wrong for everybody.
        fetched = {diff_id: layer.size for diff_id, layer in zip(base.diff_ids, pair.base.manifest.layers, strict=True)}
        full_bytes = pair.target.manifest.config.size + sum(
            fetched.get(diff_id, layer.size)
            for diff_id, layer in zip(target.diff_ids[common:], pair.target.manifest.layers[common:], strict=True)
        )
        delta_bytes = len(image.config) + sum(layer.size for layer in layers)
        # Engines on devices cannot inflate zstd: of such a target the delta is the only form that they can pull.
        pullable = not any("zstd" in layer.media_type for layer in pair.target.manifest.layers)
        if not whatever and pullable and delta_bytes > self._worth * full_bytes:
            raise NotWorth(delta_bytes, full_bytes)
        row = DeltaRow(
            pair.key,
            base_repository=pair.base.repository,
            target_repository=pair.target.repository,
            tag=delta_tag(pair.key),
            content=manifest.digest,
            full_bytes=full_bytes,
            delta_bytes=delta_bytes,
            seconds=self._clock.seconds() - started,
            created=int(self._now()),
            details={"layers": [_details(result) for result in results], "common": common, **details},
        )
        with ExitStack() as pins:
            for descriptor in (manifest.config, *manifest.layers):
                pins.enter_context(self._blobs.pin(descriptor.digest))
            # At once: each waits for the disk, which does them together.
            adopting = [
                self._blobs.adopt(Path(result["path"]), layer.digest, layer.size)
                for result, layer in zip(results, layers, strict=True)
            ]
            small = [image.config, EMPTY_LAYER_BYTES] if common else [image.config]
            done = await settle([*map(_nothing, adopting), *(_nothing(self._blobs.put(content)) for content in small)])
            failure = first_failure(done)
            if failure is not None:
                failure.raiseException()
            return await self._catalogue.publish_v3(row, manifest, self._blobs)


async def _nothing(call: Awaitable[object]) -> None:
    await call


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "path"}
