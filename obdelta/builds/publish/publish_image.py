"""Publishing of finished v3 deltas: refuses those that are too large, makes tag and image, records
both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReactorTime

from obdelta.builds.delta_size_limit import OtherFormCostsLess, check_delta_size
from obdelta.builds.publish.delta_tags import delta_tag
from obdelta.builds.types import Pair
from obdelta.concurrency.tasks import first_failure, settle
from obdelta.delta.effort import arriving_bytes
from obdelta.delta.image import FinishedLayer, compose, config_size
from obdelta.delta.layer_tar import LayerCopy
from obdelta.oci import DiffID, Digest, Form, ImageConfig, Manifest, parse_manifest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow


class DeltaImages:
    """Publishes delta images; ``max_delta_ratio`` is the setting."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        blobs: BlobStore,
        catalogue: Catalogue,
        max_delta_ratio: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._blobs, self._catalogue, self._max_delta_ratio = (
            clock,
            blobs,
            catalogue,
            max_delta_ratio,
        )
        self._now = now

    async def check_config_size(self, pair: Pair, base: ImageConfig, target: ImageConfig) -> None:
        """Raises DeltaTooLarge if base and target differ in their configs only, and the delta
        saves nothing.
        """
        delta_bytes = await self._blobs.threads.run(config_size, base, target)
        await self._check_size(pair, base, target, len(target.diff_ids), delta_bytes)

    async def known(self, pair: Pair) -> DeltaRow | None:
        """Returns the pair's delta if it is published already."""
        return await self._catalogue.delta(pair.key)

    async def publish(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        copies: Sequence[LayerCopy],
        results: Sequence[Mapping[str, Any]],
        started: float,
        *,
        any_size: bool = False,
        **details: Any,
    ) -> DeltaRow:
        """Composes the image in the pair's form, of ``copies`` of the shared layers and the proven
        layers after them, and publishes it.

        ``results`` are the worker processes' results for each proven layer, bottom to top:
        ``path``, ``digest``, ``size``, ``diff_id``, ``target`` and more, which goes into the row's
        details. Their files are moved into the store. ``started`` is by the clock. ``any_size``:
        publish at any size. Raises StoreFull, DeltaTooLarge, and OtherFormCostsLess if engines that
        read this form are better off with the delta that there is in another form.
        """
        created, seconds = int(self._now()), self._clock.seconds() - started
        layers = [
            FinishedLayer(
                Digest.parse(result["digest"]),
                result["size"],
                DiffID.parse(result["diff_id"]),
                DiffID.parse(result["target"]),
            )
            for result in results
        ]
        # In a thread: configs may have many megabytes.
        image = await self._blobs.threads.run(
            lambda: compose(
                base,
                target,
                [*(copy.layer for copy in copies), *layers],
                pair.form,
                copies=len(copies),
            )
        )
        manifest = parse_manifest(image.manifest, image.media_type)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was composed is the manifest of one image")
        common = len(copies)
        # Engines skip the copies of shared layers: no device downloads them in a pull.
        delta_bytes = len(image.config) + sum(layer.size for layer in layers)
        price = details.get("prices", {}).get(pair.form.value, 0.0)
        command_bytes = _command_bytes(results, price)
        for other in pair.readable[1:] if not any_size else ():
            known = await self.known(other)
            if known is not None and _cost(known, price) < delta_bytes + command_bytes:
                raise OtherFormCostsLess(pair.form, other.form)
        full_bytes = await self._check_size(
            pair, base, target, common, delta_bytes, command_bytes, any_size=any_size
        )
        row = DeltaRow(
            pair.key,
            base_repository=pair.base.repository,
            target_repository=pair.target.repository,
            tag=delta_tag(pair.key),
            content=manifest.digest,
            full_bytes=full_bytes,
            delta_bytes=delta_bytes,
            seconds=seconds,
            created=created,
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

    async def _check_size(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        common: int,
        delta_bytes: int,
        command_bytes: float = 0.0,
        *,
        any_size: bool = False,
    ) -> int:
        """Returns the bytes of a full pull. Raises DeltaTooLarge unless the delta is worth it, or
        ``any_size`` is set.
        """
        full_bytes = await full_pull_bytes(self._catalogue, pair, base, target, common)
        # An engine that cannot inflate the target's own layers can pull the delta only.
        pullable = Form.of_layers(pair.target.manifest.layers) is Form.UNIVERSAL
        if not any_size and pullable:
            check_delta_size(delta_bytes, full_bytes, self._max_delta_ratio, command_bytes)
        return full_bytes


def _command_bytes(results: Sequence[Mapping[str, Any]], price: float) -> float:
    """Returns the bytes that arrive while a device runs the layers' commands; 0 if their number
    is not known.
    """
    commands = (result.get("copies", 0) + result.get("literals", 0) for result in results)
    return arriving_bytes(sum(map(int, commands)), price)


def _cost(row: DeltaRow, price: float) -> float:
    """Returns the bytes of a published delta, and those that arrive while a device runs its
    commands; infinite if their number is not known.
    """
    layers = row.details.get("layers", [])
    if not all("copies" in layer for layer in layers):
        return math.inf
    return row.delta_bytes + _command_bytes(layers, price)


async def _nothing(call: Awaitable[object]) -> None:
    await call


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "path"}


async def full_pull_bytes(
    catalogue: Catalogue, pair: Pair, base: ImageConfig, target: ImageConfig, common: int
) -> int:
    """Returns the bytes of a full pull by a device that has the base: config, and layers after the
    ``common`` ones.

    Sizes are those of the actual blobs, as manifests may be wrong. A layer that the base has too
    counts with the base's blob, the only one that was fetched.
    """
    fetched = dict(zip(base.diff_ids, pair.base.manifest.layers, strict=True))
    total = len(target.raw)
    for diff_id, layer in zip(
        target.diff_ids[common:], pair.target.manifest.layers[common:], strict=True
    ):
        blob = fetched.get(diff_id, layer)
        known = await catalogue.layer(blob.digest)
        total += blob.size if known is None else known.blob_size
    return total
