"""``obdelta build``: one v3 delta image into an OCI image layout, by the builder that the server uses.

Its state lives in a folder beside the layout and goes away in the end, so a running server's is never touched.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.builds.delta_image import DeltaImages
from obdelta.builds.images import ImageLookup
from obdelta.builds.layers import LayerImporter
from obdelta.builds.pair import Pair
from obdelta.builds.pool import WorkerPool
from obdelta.builds.v3 import NativeV3
from obdelta.cli.bars import Line
from obdelta.cli.layouts import put_image
from obdelta.errors import Cancelled, ManifestInvalid, ManifestUnknown
from obdelta.oci import Manifest, Reference, parse_manifest
from obdelta.settings import Settings
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import LayerCache
from obdelta.store.rows import DeltaRow
from obdelta.store.threads import Threads
from obdelta.wiring.building import WORKER_NICENESS
from obdelta.wiring.choices import make_policy, make_upstream

_THREADS = 4


def build(configured: Settings, source: str, target: str, output: Path) -> None:
    """Builds, prints the figures; raises what went wrong."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".obdelta-", dir=output.parent) as state, Line(sys.stderr) as line:
        row = _react(configured, Reference.parse(source), Reference.parse(target), output, Path(state), line)
    saving = 1 - row.delta_bytes / row.full_bytes if row.full_bytes else 0.0
    print(
        f"built        {output}:{_name(row)}\n"
        f"full update  {row.full_bytes:>15,} bytes\n"
        f"delta        {row.delta_bytes:>15,} bytes ({saving:.1%} saved)\n"
        f"built in     {row.seconds:>15.2f} s, every layer proven"
    )


def _react(
    configured: Settings, source: Reference, target: Reference, output: Path, state: Path, line: Line
) -> DeltaRow:
    outcome: list[DeltaRow | Failure] = []

    def run(reactor: Any) -> Deferred[None]:
        done = ensureDeferred(_build(reactor, configured, source, target, output, state, line))
        return done.addBoth(outcome.append)

    with suppress(SystemExit):  # react always ends so; what counts is the outcome
        task.react(run)
    if not outcome:
        raise Cancelled("interrupted")
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]


async def _build(
    reactor: Any, configured: Settings, source: Reference, target: Reference, output: Path, state: Path, line: Line
) -> DeltaRow:
    async with AsyncExitStack() as closing:
        workers = ThreadPool(1, _THREADS, "obdelta")
        workers.start()
        closing.callback(workers.stop)
        threads = Threads(reactor, workers)
        upstream = make_upstream(configured, reactor, threads)
        closing.push_async_callback(upstream.close)
        blobs = BlobStore(state, threads)
        catalogue = await Catalogue.open(state / "catalogue.sqlite", reactor)
        closing.push_async_callback(catalogue.close)
        pool = WorkerPool(reactor, configured.max_builds, configured.worker_memory, WORKER_NICENESS)
        closing.push_async_callback(pool.close)
        cache = await LayerCache.open(state, threads, configured.layer_cache or configured.store_quota)
        importer = LayerImporter(
            upstream=upstream,
            blobs=blobs,
            cache=cache,
            catalogue=catalogue,
            pool=pool,
            max_layer=configured.max_layer,
            job_seconds=configured.build_timeout,
        )
        builder = NativeV3(
            clock=reactor,
            upstream=upstream,
            importer=importer,
            blobs=blobs,
            # A delta of any size: who asks by hand wants to see it.
            images=DeltaImages(clock=reactor, blobs=blobs, catalogue=catalogue, worth=math.inf),
            pool=pool,
            effort=configured.effort,
            threads=len(os.sched_getaffinity(0)),
            index_dir=str(cache.root),
            job_seconds=configured.build_timeout,
        )
        lookup, credentials = ImageLookup(upstream, reactor), make_policy(configured).credentials(None)
        line.show("fetching manifests")
        pair = Pair(
            builder.kind,
            builder.recipe,
            await lookup.resolve(source, credentials),
            await lookup.resolve(target, credentials),
        )
        row = await builder.build(pair, credentials, _Shown(line), lambda _file: None)
        found = await catalogue.manifest(row.target_repository, row.content)
        if found is None:
            raise ManifestUnknown(row.target_repository, str(row.content))
        manifest = parse_manifest(found.raw, found.media_type)
        if not isinstance(manifest, Manifest):
            raise ManifestInvalid(str(row.content), "it should be one image")
        await threads.run(put_image, output, _name(row), manifest, blobs.path)
        return row


def _name(row: DeltaRow) -> str:
    return row.tag or "latest"


class _Shown:
    """A builder's reports as a bar that only ever grows."""

    def __init__(self, line: Line) -> None:
        self._line, self._share = line, 0.0

    def __call__(self, report: Mapping[str, Any]) -> None:
        stage = str(report.get("stage", ""))
        if "layers" not in report:
            self._line.show(stage)
            return
        layer, layers, of = int(report["layer"]), int(report["layers"]), int(report["of"])
        self._share = max(self._share, (layer + (int(report["done"]) / of if of else 0.0)) / layers)
        self._line.show(f"layer {layer + 1}/{layers} {stage}", self._share)
