"""The native v2 builder: rsync batches from trees that need neither root nor a daemon."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obdelta.builds.deadlines import work_seconds
from obdelta.builds.inputs.layer_inputs import full_pull_bytes, wanted_layers
from obdelta.builds.inputs.tree_inputs import TreeMaker
from obdelta.builds.rsync_probe import RsyncProbe
from obdelta.builds.types import DeltaTooLarge, Grows, Pair, Report
from obdelta.concurrency.single_flight import first_failure, settle
from obdelta.errors import ProgramUnusable, ProofFailed, WorkerFailed
from obdelta.oci import ImageConfig, common_prefix
from obdelta.registry import Credentials, Upstream
from obdelta.rsync.docker_config import docker_config
from obdelta.rsync.recorder_process import Order, Recorded, RsyncRun
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.tree_cache import PinnedTree
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Kind
from obdelta.store.file_writer import ExternalFile

V2_RECIPE = 2
"""Incremented whenever the same pair may give another batch."""
HELD_BACK = 4096
"""Bytes at a batch's end that are withheld until it has been proven."""


class RsyncV2:
    """Builds v2 deltas. ``reactor`` is also the clock; ``worth`` is the setting of that name.

    ``forecast``: whether to predict the length of a batch while it is written (it costs reading the
    trees once more).
    """

    kind: Kind = "v2"
    recipe = V2_RECIPE

    def __init__(
        self,
        *,
        reactor: Any,
        upstream: Upstream,
        trees: TreeMaker,
        blobs: BlobStore,
        catalogue: Catalogue,
        worth: float,
        job_seconds: float,
        forecast: bool,
        probe: RsyncProbe,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reactor, self._upstream, self._trees = reactor, upstream, trees
        self._blobs, self._catalogue = blobs, catalogue
        self._worth, self._forecast, self._now = worth, forecast, now
        self._job_seconds, self._probe = job_seconds, probe
        self._rsync = RsyncRun(reactor)

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        grows: Grows,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Fetches, unpacks, records (readers may follow), proves and publishes.

        Raises DeltaTooLarge and what its steps raise.
        """
        started = self._reactor.seconds()
        if (unusable := await self._probe.problem()) is not None:
            raise ProgramUnusable(unusable)
        report({"stage": "fetch"})
        base = await pair.base.config(self._upstream, credentials)
        target = await pair.target.config(self._upstream, credentials)
        wanted = wanted_layers(pair.base, base), wanted_layers(pair.target, target)
        results = await settle(self._trees.ensure(layers, credentials) for layers in wanted)
        trees = [result for result in results if isinstance(result, PinnedTree)]
        out, scratch = self._blobs.temporary(".batch"), self._blobs.temporary(".scratch")
        recorded: Recorded | None = None
        try:
            failure = first_failure(results)
            if failure is not None:
                failure.raiseException()
            # Two builds of a pair may have different bytes: no download should mix them.
            growing = ExternalFile(
                out, self._blobs.threads, unverified_tail=HELD_BACK, name=secrets.token_hex(16)
            )
            fetched = self._reactor.seconds()
            report({"stage": "record"})
            try:
                size = await self._trees.inflated_size([*wanted[0], *wanted[1]])
                seconds = work_seconds(size, self._job_seconds)
                recorded = await self._record(trees, target, out, scratch, growing, grows, seconds)
                growing.tail = recorded.tail
                common = common_prefix(base.diff_ids, target.diff_ids)
                full_bytes = await full_pull_bytes(self._catalogue, pair, base, target, common)
                if recorded.size > self._worth * full_bytes:
                    # It is proven: its current readers get its end. No other reader begins.
                    growing.finished()
                    raise DeltaTooLarge(recorded.size, full_bytes)
                row = self._row(pair, full_bytes, recorded, growing.name, started, fetched)
                with self._blobs.pin(row.content):
                    path = await self._blobs.adopt(out, row.content, row.delta_bytes)
                    row = await self._catalogue.publish_v2(row, self._blobs)
                    growing.finished(path)
            except BaseException as error:
                growing.failed(
                    error if isinstance(error, Exception) else WorkerFailed("it was called off")
                )
                raise
            return row
        except ProofFailed:
            for layers in wanted:
                await self._trees.drop(layers)
            raise
        finally:
            for tree in trees:
                tree.release()
            # After a success the recorder removes its scratch files, while the delta is served
            # already.
            for place in (out,) if recorded is not None else (out, scratch):
                await self._blobs.threads.run(files.remove, place)

    async def _record(
        self,
        trees: list[PinnedTree],
        target: ImageConfig,
        out: Path,
        scratch: Path,
        growing: ExternalFile,
        grows: Grows,
        seconds: float,
    ) -> Recorded:
        def grew(size: int, rest: int | None) -> None:
            growing.grew(size, rest)
            grows(growing)

        order = Order(
            trees[0].path, trees[1].path, docker_config(target), out, scratch, self._forecast
        )
        return await self._rsync.run(order, grew=grew, seconds=seconds)

    def _row(
        self,
        pair: Pair,
        full_bytes: int,
        recorded: Recorded,
        name: str,
        started: float,
        fetched: float,
    ) -> DeltaRow:
        return DeltaRow(
            pair.key,
            base_repository=pair.base.repository,
            target_repository=pair.target.repository,
            tag=None,
            content=recorded.digest,
            full_bytes=full_bytes,
            delta_bytes=recorded.size,
            seconds=self._reactor.seconds() - started,
            created=int(self._now()),
            details={
                "entries": recorded.entries,
                "shares": recorded.shares,
                "seconds": {
                    "fetch": round(fetched - started, 3),  # unpacking included
                    "record": recorded.seconds,
                    "prove": round(
                        max(0.0, self._reactor.seconds() - fetched - recorded.seconds), 3
                    ),
                },
                "name": name,
                "tail": recorded.tail,
                "sent_index": recorded.sent_index,
            },
        )
