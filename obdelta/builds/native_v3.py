"""The native v3 builder: balena-engine delta images, made by our own worker processes without a
daemon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.device_estimates import CommandPrices
from obdelta.builds.inputs.image_lookup import ImageLookup, image_layers
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.inputs.work_limits import work_seconds
from obdelta.builds.publish.publish_image import DeltaImages
from obdelta.builds.rebuild import Rebuild
from obdelta.builds.types import Pair, Report, ReportFile
from obdelta.delta.build import RECIPE, Effort
from obdelta.delta.layer_tar import layer_copies
from obdelta.errors import ProofFailed
from obdelta.observability import Metrics
from obdelta.oci import Digest, Form, common_prefix
from obdelta.processes.worker_main import layer_path
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import PinnedLayer
from obdelta.store.catalogue.records import DeltaRow, Kind

log = Logger()


class NativeV3:
    """Builds v3 deltas, in one of ``forms`` each. ``threads``: how many threads each build may use
    in its worker process.
    """

    kind: Kind = "v3"
    recipe = RECIPE

    def __init__(
        self,
        *,
        clock: IReactorTime,
        lookup: ImageLookup,
        importer: LayerImporter,
        blobs: BlobStore,
        images: DeltaImages,
        pool: WorkerPool,
        forms: tuple[Form, ...],
        effort: str,
        prices: CommandPrices,
        threads: int,
        index_dir: str,
        job_seconds: float,
        metrics: Metrics,
    ) -> None:
        self._clock, self._lookup, self._importer = clock, lookup, importer
        self._blobs, self._images, self._pool = blobs, images, pool
        self.forms, self._effort, self._prices = forms, effort, prices
        self._threads = threads
        self._index_dir, self._job_seconds, self._metrics = index_dir, job_seconds, metrics

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Fetches, builds, proves and publishes. Raises DeltaTooLarge and what its steps raise."""
        if low_memory:
            return await self._make(pair, credentials, report, Effort.FAST.value, 1, None)
        return await self._make(pair, credentials, report, self._effort, self._threads, None)

    async def rebuild(
        self, pair: Pair, credentials: Credentials, report: Report, rebuild: Rebuild
    ) -> DeltaRow:
        """See :class:`obdelta.builds.rebuild.Rebuilder`."""
        return await self._make(pair, credentials, report, rebuild.effort, self._threads, rebuild)

    async def _make(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        effort: str,
        threads: int,
        rebuild: Rebuild | None,
    ) -> DeltaRow:
        started = self._clock.seconds()
        if rebuild is None:
            found = await self._prices.of(pair.base.repository, pair.target.repository)
            prices = {form.value: price for form, price in found.items()}
        else:
            prices = rebuild.prices
        report({"stage": "fetch"})
        base, target = await self._lookup.configs(pair, credentials)
        common = common_prefix(base.diff_ids, target.diff_ids)
        in_base = set(base.diff_ids)
        wanted_base = image_layers(pair.base, base)
        wanted_target = [
            layer
            for layer in image_layers(pair.target, target)[common:]
            if layer.diff_id not in in_base
        ]
        if common == len(target.diff_ids):
            # Only the config differs, and a full pull is mostly as small: that is known before a
            # layer is fetched.
            if rebuild is None:
                await self._images.check_config_size(pair, base, target)
            shared = layer_copies(await self._importer.sizes(wanted_base[:common], credentials))
            return await self._images.publish(
                pair,
                base,
                target,
                shared,
                (),
                started,
                effort=effort,
                any_size=rebuild is not None,
            )
        pinned: list[PinnedLayer] = []
        stem = self._blobs.temporary("")
        try:
            pinned = await self._importer.ensure_all(
                wanted_base + wanted_target, credentials, images=2
            )
            fetched = self._clock.seconds()
            files = {pin.diff_id: pin for pin in pinned}
            wanted = target.diff_ids[common:]
            following = None
            if rebuild is not None:
                outs = [layer_path(stem, number) for number in range(len(wanted))]
                following = rebuild.follow(outs, self._clock)
            work = self._pool.run(
                {
                    "task": "delta",
                    "base": [_file(files[diff_id]) for diff_id in base.diff_ids],
                    "targets": [
                        {"diff_id": str(diff_id)} if diff_id in in_base else _file(files[diff_id])
                        for diff_id in wanted
                    ],
                    "out_dir": str(stem.parent),
                    "stem": stem.name,
                    "form": pair.form.value,
                    "effort": effort,
                    "prices": prices,
                    "threads": threads,
                    "index_dir": self._index_dir,
                },
                seconds=work_seconds(sum(pin.size for pin in pinned), self._job_seconds),
                progress=report,
            )
            try:
                result = await work
            finally:
                if following is not None:
                    following.stop()
            self._metrics.layers_matched(
                result["indexes"]["kept"], result["indexes"]["made"], result["peak_memory"]
            )
            layers = result["layers"]
            self._check(pair, layers)
            if rebuild is not None:
                rebuild.compare(layers)
            with ExitStack() as in_use:
                if rebuild is not None:
                    # Not evicted before readers have their last bytes.
                    for layer in layers:
                        in_use.enter_context(self._blobs.pin(Digest.parse(layer["digest"])))
                row = await self._images.publish(
                    pair,
                    base,
                    target,
                    layer_copies(
                        (diff_id, files[diff_id].size) for diff_id in base.diff_ids[:common]
                    ),
                    layers,
                    started,
                    effort=effort,
                    prices=prices,
                    seconds={"fetch": round(fetched - started, 3)},
                    any_size=rebuild is not None,
                )
                if rebuild is not None:
                    rebuild.finished(self._blobs.path)
            return row
        except ProofFailed:
            await self._importer.drop(pin.diff_id for pin in pinned)
            raise
        finally:
            for pin in pinned:
                pin.release()
            for leftover in stem.parent.glob(f"{stem.name}-*"):
                leftover.unlink(missing_ok=True)

    def _check(self, pair: Pair, layers: Sequence[Mapping[str, Any]]) -> None:
        """Reports layers that show a fault in the search. They are proven: devices may use them."""
        for layer in layers:
            if layer["lost"]:
                self._metrics.delta_faults.labels("known-bytes").inc()
                log.error(
                    "plan replaced: layer {layer} of {pair} lost {lost} known bytes: please report"
                    " the pair",
                    layer=layer["target"],
                    pair=str(pair),
                    lost=layer["lost"],
                )
            if layer["excess"]:
                self._metrics.delta_faults.labels("oversized").inc()
                log.warn(
                    "delta larger than expected: layer {layer} of {pair} has {size} bytes, {excess}"
                    " more than its changed entries account for: please report the pair",
                    layer=layer["target"],
                    pair=str(pair),
                    size=layer["size"],
                    excess=layer["excess"],
                )


def _file(pin: PinnedLayer) -> dict[str, Any]:
    return {"diff_id": str(pin.diff_id), "path": str(pin.path), "size": pin.size}
