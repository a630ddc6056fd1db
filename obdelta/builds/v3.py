"""The native v3 builder: balena-engine delta images, made by our own workers without a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReactorTime

from obdelta.builds.concurrent import first_failure, settle
from obdelta.builds.coordinator import Grows, NotWorth, Pair, Report
from obdelta.builds.layers import LayerImporter, wanted_layers
from obdelta.builds.pool import WorkerPool
from obdelta.delta.build import RECIPE, DeltaLayer
from obdelta.delta.image import EMPTY_LAYER_BYTES, compose
from obdelta.oci import DiffID, Digest, ImageConfig, Manifest, common_prefix, parse_manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import Credentials, Upstream
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import PinnedLayer
from obdelta.store.rows import DeltaKey, DeltaRow, Kind


def delta_tag(key: DeltaKey) -> str:
    """``delta-<16 hex>``: a name for the contents of both images and the recipe, so that it never means anything else."""
    text = f"{key.kind} {key.recipe} {key.base} {key.target}"
    return f"delta-{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}"


class NativeV3:
    """Builds v3 deltas. ``threads`` each build may use in its worker; ``worth`` is the setting of that name."""

    kind: Kind = "v3"
    recipe = RECIPE

    def __init__(
        self,
        *,
        clock: IReactorTime,
        upstream: Upstream,
        importer: LayerImporter,
        blobs: BlobStore,
        catalogue: Catalogue,
        pool: WorkerPool,
        effort: str,
        threads: int,
        worth: float,
        index_dir: str,
        job_seconds: float,
    ) -> None:
        self._clock, self._upstream, self._importer = clock, upstream, importer
        self._blobs, self._catalogue, self._pool = blobs, catalogue, pool
        self._effort, self._threads, self._worth = effort, threads, worth
        self._index_dir, self._job_seconds = index_dir, job_seconds

    async def build(self, pair: Pair, credentials: Credentials, report: Report, grows: Grows) -> DeltaRow:
        """Fetch, build, prove and publish. Raises NotWorth and whatever its steps raise."""
        started = self._clock.seconds()
        report({"stage": "fetch"})
        base = await pair.base.config(self._upstream, credentials)
        target = await pair.target.config(self._upstream, credentials)
        common = common_prefix(base.diff_ids, target.diff_ids)
        in_base = set(base.diff_ids)
        wanted_base = wanted_layers(pair.base, base)
        wanted_target = [layer for layer in wanted_layers(pair.target, target)[common:] if layer.diff_id not in in_base]
        if common == len(target.diff_ids):
            # Only the config differs, and a full pull brings no more than that either: no layer is worth fetching.
            return await self._publish(pair, base, target, common, [], started)
        pinned: list[PinnedLayer] = []
        stem = self._blobs.temporary("")
        try:
            results = await settle(
                self._importer.ensure(layer, credentials) for layer in dict.fromkeys(wanted_base + wanted_target)
            )
            pinned = [result for result in results if isinstance(result, PinnedLayer)]
            failure = first_failure(results)
            if failure is not None:
                failure.raiseException()
            files = {pin.diff_id: pin for pin in pinned}
            result = await self._pool.run(
                {
                    "task": "delta",
                    "base": [_file(files[diff_id]) for diff_id in base.diff_ids],
                    "targets": [
                        {"diff_id": str(diff_id)} if diff_id in in_base else _file(files[diff_id])
                        for diff_id in target.diff_ids[common:]
                    ],
                    "out_dir": str(stem.parent),
                    "stem": stem.name,
                    "effort": self._effort,
                    "threads": self._threads,
                    "index_dir": self._index_dir,
                },
                seconds=self._job_seconds,
                progress=report,
            )
            return await self._publish(pair, base, target, common, result["layers"], started)
        finally:
            for pin in pinned:
                pin.release()
            for leftover in stem.parent.glob(f"{stem.name}-*"):
                leftover.unlink(missing_ok=True)

    async def _publish(
        self,
        pair: Pair,
        base: ImageConfig,
        target: ImageConfig,
        common: int,
        results: Sequence[dict[str, Any]],
        started: float,
    ) -> DeltaRow:
        layers = [_delta_layer(result) for result in results]
        image = compose(base, target, layers)
        manifest = parse_manifest(image.manifest, DOCKER_MANIFEST)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was composed is the manifest of one image")
        full_bytes = pair.target.manifest.config.size + sum(
            layer.size for layer in pair.target.manifest.layers[common:]
        )
        delta_bytes = len(image.config) + sum(layer.size for layer in layers)
        # Engines on devices cannot inflate zstd: of such a target the delta is the only form that they can pull.
        pullable = not any("zstd" in layer.media_type for layer in pair.target.manifest.layers)
        if pullable and delta_bytes > self._worth * full_bytes:
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
            created=int(self._clock.seconds()),
            details={"layers": [_details(result) for result in results], "common": common},
        )
        with ExitStack() as pins:
            for descriptor in (manifest.config, *manifest.layers):
                pins.enter_context(self._blobs.pin(descriptor.digest))
            for result, layer in zip(results, layers, strict=True):
                await self._blobs.adopt(Path(result["path"]), layer.digest, layer.size)
            await self._blobs.put(image.config)
            if common:
                await self._blobs.put(EMPTY_LAYER_BYTES)
            return await self._catalogue.publish_v3(row, manifest, self._blobs)


def _file(pin: PinnedLayer) -> dict[str, Any]:
    return {"diff_id": str(pin.diff_id), "path": str(pin.path), "size": pin.size}


def _delta_layer(result: dict[str, Any]) -> DeltaLayer:
    return DeltaLayer(
        digest=Digest.parse(result["digest"]),
        size=result["size"],
        diff_id=DiffID.parse(result["diff_id"]),
        tar_size=result["tar_size"],
        target=DiffID.parse(result["target"]),
        copies=result["copies"],
        small_copies=result["small_copies"],
        literal_bytes=result["literal_bytes"],
        copied_bytes=result["copied_bytes"],
        seconds=result["seconds"],
    )


def _details(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "path"}
