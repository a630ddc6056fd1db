"""Publishing of finished v3 deltas: composes the delta image, and records it in store and
catalogue.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReactorTime

from obdelta.builds.inputs.layer_inputs import full_pull_bytes
from obdelta.builds.types import DeltaTooLarge, Pair
from obdelta.concurrency.single_flight import first_failure, settle
from obdelta.delta.image import MadeLayer, compose, config_size
from obdelta.delta.layer_copy import LayerCopy
from obdelta.oci import DiffID, Digest, ImageConfig, Manifest, parse_manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow


def delta_tag(key: DeltaKey) -> str:
    """Returns ``delta-<16 hex>``: a name for both images' contents and the recipe, so that its
    meaning never changes.
    """
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

    async def weigh_config(self, pair: Pair, base: ImageConfig, target: ImageConfig) -> None:
        """Raises DeltaTooLarge where base and target differ in their configs only, and the delta
        saves nothing.
        """
        delta_bytes = await self._blobs.threads.run(config_size, base, target)
        await self._weigh(pair, base, target, len(target.diff_ids), delta_bytes)

    async def publish(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        copies: Sequence[LayerCopy],
        results: Sequence[Mapping[str, Any]],
        started: float,
        *,
        whatever: bool = False,
        **details: Any,
    ) -> DeltaRow:
        """Composes an image of ``copies`` of the shared layers and the proven layers after them,
        and publishes it.

        ``results`` are workers' results for each proven layer, bottom to top: ``path``, ``digest``,
        ``size``, ``diff_id``, ``target`` and more, which goes into the row's details. Their files
        are taken over. ``started`` is by the clock. ``whatever``: publish at any size. Raises
        DeltaTooLarge, StoreFull.
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
        image = await self._blobs.threads.run(
            compose, base, target, [*(copy.layer for copy in copies), *layers]
        )
        manifest = parse_manifest(image.manifest, DOCKER_MANIFEST)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was composed is the manifest of one image")
        common = len(copies)
        # Engines skip the copies of shared layers: no device downloads them in a pull.
        delta_bytes = len(image.config) + sum(layer.size for layer in layers)
        full_bytes = await self._weigh(pair, base, target, common, delta_bytes, whatever=whatever)
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
            details={
                "layers": [_details(result) for result in results],
                "common": common,
                **details,
            },
        )
        with ExitStack() as pins:
            for descriptor in (manifest.config, *manifest.layers):
                pins.enter_context(self._blobs.pin(descriptor.digest))
            # All at once: each waits for the disk, which does them together.
            adopting = [
                self._blobs.adopt(Path(result["path"]), layer.digest, layer.size)
                for result, layer in zip(results, layers, strict=True)
            ]
            small = dict.fromkeys([image.config, *(copy.content for copy in copies)])
            done = await settle(
                [
                    *map(_nothing, adopting),
                    *(_nothing(self._blobs.put(content)) for content in small),
                ]
            )
            failure = first_failure(done)
            if failure is not None:
                failure.raiseException()
            return await self._catalogue.publish_v3(row, manifest, self._blobs)

    async def _weigh(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        common: int,
        delta_bytes: int,
        *,
        whatever: bool = False,
    ) -> int:
        """Returns the bytes of a full pull. Raises DeltaTooLarge unless the delta is small enough,
        or ``whatever`` is set.
        """
        full_bytes = await full_pull_bytes(self._catalogue, pair, base, target, common)
        # Engines on devices cannot inflate zstd: of such a target they can pull the delta only.
        pullable = not any("zstd" in layer.media_type for layer in pair.target.manifest.layers)
        if not whatever and pullable and delta_bytes > self._worth * full_bytes:
            raise DeltaTooLarge(delta_bytes, full_bytes)
        return full_bytes


async def _nothing(call: Awaitable[object]) -> None:
    await call


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "path"}
