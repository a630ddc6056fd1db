"""The v3 builder that lets a balena-engine make the delta (setting ``builder``).

The engine pulls both images and makes the delta. The result is saved into our store, packed and
proven like our own, and served or pushed from there. For layers that both images share, copies out
of the base replace the engine's empty layers, which fail in host-OS updates. Images that were
pulled for a build are removed from the engine; images that it had before stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from twisted.internet.interfaces import IReactorTime

from obdelta.builds.engine.images import Engine
from obdelta.builds.engine.saved_image import SavedImage, Watch
from obdelta.builds.inputs.image_lookup import ImageLookup, ResolvedImage, image_layers
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.inputs.work_limits import work_seconds
from obdelta.builds.publish.publish_image import DeltaImages
from obdelta.builds.types import Pair, Report, ReportFile
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.delta.layer_tar import layer_copies
from obdelta.errors import ProofFailed
from obdelta.oci import DiffID, Form, ImageConfig, common_prefix, parse_config
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import PinnedLayer
from obdelta.store.catalogue.records import DeltaRow, Kind

ENGINE_RECIPE = 100_002
"""Far from the native builder's recipes, which are counted from 1."""


class EngineV3:
    """Builds v3 deltas with an :class:`Engine`; ``max_layer`` bounds the bytes that it may save."""

    kind: Kind = "v3"
    recipe = ENGINE_RECIPE
    forms: tuple[Form, ...] = (Form.UNIVERSAL,)

    def __init__(
        self,
        *,
        clock: IReactorTime,
        reactor_call: Callable[..., None],
        engine: Engine,
        lookup: ImageLookup,
        importer: LayerImporter,
        blobs: BlobStore,
        images: DeltaImages,
        pool: WorkerPool,
        threads: int,
        max_layer: int,
        job_seconds: float,
    ) -> None:
        """``reactor_call`` is the reactor's ``callFromThread``."""
        self._clock, self._reactor_call, self._engine, self._lookup = (
            clock,
            reactor_call,
            engine,
            lookup,
        )
        self._importer, self._blobs, self._images, self._pool = importer, blobs, images, pool
        self._threads, self._max_layer, self._job_seconds = threads, max_layer, job_seconds

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Pulls, builds, saves, proves and publishes. Raises EngineUnavailable, EngineFailed and
        what the steps raise.
        """
        pair = pair.in_form(*self.forms)
        if (known := await self._images.known(pair)) is not None:
            return known
        started = self._clock.seconds()
        report({"stage": "fetch"})
        base, target = await self._lookup.configs(pair, credentials)
        common = common_prefix(base.diff_ids, target.diff_ids)
        if common == len(target.diff_ids):
            await self._images.check_config_size(pair, base, target)
            shared = layer_copies(
                await self._importer.sizes(image_layers(pair.base, base)[:common], credentials)
            )
            return await self._images.publish(pair, base, target, shared, [], started)
        layers = [*image_layers(pair.base, base), *image_layers(pair.target, target)]
        # An engine does not pull a layer that it has already, whichever client brought it.
        await self._importer.admit(dict.fromkeys(layers), credentials)
        stem = self._blobs.temporary("")
        pinned: list[PinnedLayer] = []
        watch = Watch(lambda step: self._reactor_call(report, step))
        try:
            saved = await self._made(pair, credentials, stem, watch)
            diff_ids = _checked(saved, base, target, common)
            report({"stage": "fetch"})
            pinned = await self._importer.ensure_all(image_layers(pair.base, base), credentials)
            files = {pin.diff_id: pin for pin in pinned}
            result = await self._pool.run(
                {
                    "task": "adopt",
                    "base": [
                        {"diff_id": str(pin.diff_id), "path": str(pin.path), "size": pin.size}
                        for pin in (files[diff_id] for diff_id in base.diff_ids)
                    ],
                    "layers": [
                        {"path": str(path), "diff_id": str(diff_id), "target": str(wanted)}
                        for path, diff_id, wanted in zip(
                            saved.layers[common:],
                            diff_ids[common:],
                            target.diff_ids[common:],
                            strict=True,
                        )
                    ],
                    "out_dir": str(stem.parent),
                    "stem": stem.name,
                    "threads": 1 if low_memory else self._threads,
                },
                # The proof rebuilds the target's layers, which stay on the engine: their sizes are
                # bounded.
                seconds=work_seconds(
                    sum(pin.size for pin in pinned)
                    + self._importer.max_bytes(image_layers(pair.target, target)[common:]),
                    self._job_seconds,
                ),
                progress=report,
            )
            # The engine has empty layers for those that both images share. Copies replace them, as
            # in our own deltas.
            shared = layer_copies(
                (diff_id, files[diff_id].size) for diff_id in base.diff_ids[:common]
            )
            return await self._images.publish(
                pair,
                base,
                target,
                shared,
                result["layers"],
                started,
                builder="balena-engine",
            )
        except ProofFailed:
            await self._importer.drop(pin.diff_id for pin in pinned)
            raise
        finally:
            for pin in pinned:
                pin.release()
            for leftover in stem.parent.glob(f"{stem.name}-*"):
                leftover.unlink(missing_ok=True)

    async def _made(
        self, pair: Pair, credentials: Credentials, stem: Path, watch: Watch
    ) -> SavedImage:
        """Returns the delta image as files, and leaves the engine as it was."""
        engine = self._engine
        held: list[ResolvedImage] = []
        tag = f"obdelta/{hashlib.sha256(str(pair.key).encode()).hexdigest()[:32]}:building"
        await engine.remove_leftovers()
        try:
            for image in (pair.base, pair.target):
                await engine.hold(image, credentials, watch)
                held.append(image)
            base, target = (image.manifest.config.digest for image in (pair.base, pair.target))
            return await engine.delta(base, target, tag, stem, self._max_layer, watch)
        finally:
            for image in held:
                await engine.release(image)


def _checked(
    saved: SavedImage, base: ImageConfig, target: ImageConfig, common: int
) -> list[DiffID]:
    """Returns the diff_ids of the engine's delta. Raises ProofFailed unless it is the delta of
    these two images.
    """
    config = parse_config(saved.config, "the engine's delta image")
    inner = config.value.get("config")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    labels = labels if isinstance(labels, dict) else {}
    carried = labels.get(CONFIG_LABEL)
    same_base = labels.get(BASE_LABEL) == str(base.image_id)
    same_target = (
        isinstance(carried, str) and carried.encode("utf-8", "surrogatepass") == target.raw
    )
    empty = all(diff_id == EMPTY_LAYER_DIFF_ID for diff_id in config.diff_ids[:common])
    if (
        same_base
        and same_target
        and empty
        and len(saved.layers) == len(config.diff_ids) == len(target.diff_ids)
    ):
        return list(config.diff_ids)
    raise ProofFailed("the engine's delta image", "it is not a delta between these two images")
