"""The native v2 builder: rsync batches from trees that need neither root nor a daemon."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import ensureDeferred

from obdelta.builds.delta_size_limit import DeltaTooLarge, check_delta_size
from obdelta.builds.inputs.image_lookup import ImageLookup, image_layers
from obdelta.builds.inputs.tree_inputs import TreeMaker
from obdelta.builds.inputs.work_limits import work_seconds
from obdelta.builds.publish.publish_image import full_pull_bytes
from obdelta.builds.types import Pair, Report, ReportFile
from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads, first_failure, settle
from obdelta.errors import ProgramUnusable, ProofFailed, WorkerFailed
from obdelta.oci import Form, ImageConfig, common_prefix, printable_name
from obdelta.registry import Credentials
from obdelta.rsync.docker_config import docker_config
from obdelta.rsync.recorder_process import RecordedStream, RecordingJob, RsyncRun
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import PinnedTree
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Kind
from obdelta.store.file_writer import ExternalFile

V2_RECIPE = 2
"""Incremented whenever the same pair may give another batch."""
UNVERIFIED_TAIL = 4096
"""Bytes at a batch's end that are withheld until it has been proven."""
AVAILABLE_SECONDS, UNAVAILABLE_SECONDS = 60.0, 5.0
"""Seconds for which a good and a bad answer are valid."""
_TIMEOUT = 10.0
"""Seconds for a call that takes some milliseconds."""
_REST = (
    "v2 is answered with full pulls: install rsync 3.2 or newer, and see that this user may run it"
)


def why_unusable(rsync: str = "rsync") -> str | None:
    """Runs ``rsync --version`` and returns the problem, None if there is none. Blocking."""
    try:
        ran = subprocess.run(
            [rsync, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return f"rsync is missing: {_REST}"
    except subprocess.TimeoutExpired:
        return f"rsync did not answer within {_TIMEOUT:g} seconds: {_REST}"
    except OSError as error:
        return (
            f"rsync cannot be started: {printable_name((error.strerror or '').encode())}: {_REST}"
        )
    if ran.returncode < 0:
        return f"rsync was killed by signal {-ran.returncode}: {_REST}"
    if ran.returncode:
        return f"rsync ended with status {ran.returncode}: {_REST}"
    return None


class RsyncProbe:
    """Repeats the check when its result is old. ``seconds`` gives monotonic time."""

    def __init__(self, threads: Threads, seconds: Callable[[], float]) -> None:
        self._threads, self._seconds = threads, seconds
        self._found: str | None = None
        self._until = float("-inf")

    async def problem(self) -> str | None:
        """Returns the problem with rsync in one line; None if there is none."""
        if self._seconds() >= self._until:
            self._found = await self._threads.run(why_unusable)
            self._until = self._seconds() + (
                AVAILABLE_SECONDS if self._found is None else UNAVAILABLE_SECONDS
            )
        return self._found

    def note(self) -> str:
        """Returns the last known problem, for operators; empty if there was none."""
        if self._seconds() >= self._until:
            # Stopping the server cancels it.
            ensureDeferred(self.problem()).addErrback(lambda _: None)
        return self._found or ""


class RsyncV2:
    """Builds v2 deltas. ``reactor`` is also the clock; ``max_delta_ratio`` is the setting.

    ``forecast``: whether to predict the length of a batch while it is written (it costs reading the
    trees once more).
    """

    kind: Kind = "v2"
    forms: tuple[Form, ...] = (Form.UNIVERSAL,)
    recipe = V2_RECIPE

    def __init__(
        self,
        *,
        reactor: IReactor,
        lookup: ImageLookup,
        trees: TreeMaker,
        blobs: BlobStore,
        catalogue: Catalogue,
        max_delta_ratio: float,
        job_seconds: float,
        forecast: bool,
        probe: RsyncProbe,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reactor, self._lookup, self._trees = reactor, lookup, trees
        self._blobs, self._catalogue = blobs, catalogue
        self._max_delta_ratio, self._forecast, self._now = max_delta_ratio, forecast, now
        self._job_seconds, self.probe = job_seconds, probe
        self._rsync = RsyncRun(reactor)

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Fetches, unpacks, records (readers may follow), proves and publishes.

        Raises DeltaTooLarge and what its steps raise.
        """
        started = self._reactor.seconds()
        if (unusable := await self.probe.problem()) is not None:
            raise ProgramUnusable(unusable)
        report({"stage": "fetch"})
        base, target = await self._lookup.configs(pair, credentials)
        wanted = image_layers(pair.base, base), image_layers(pair.target, target)
        results = await settle(self._trees.ensure(layers, credentials) for layers in wanted)
        trees = [result for result in results if isinstance(result, PinnedTree)]
        out, scratch = self._blobs.temporary(".batch"), self._blobs.temporary(".scratch")
        recorded: RecordedStream | None = None
        try:
            failure = first_failure(results)
            if failure is not None:
                failure.raiseException()
            # Two builds of a pair may have different bytes: no download should mix them.
            growing = ExternalFile(
                out,
                self._blobs.threads,
                unverified_tail=UNVERIFIED_TAIL,
                name=secrets.token_hex(16),
            )
            fetched = self._reactor.seconds()
            report({"stage": "record"})
            try:
                size = await self._trees.inflated_size([*wanted[0], *wanted[1]])
                seconds = work_seconds(size, self._job_seconds)
                recorded = await self._record(
                    trees, target, out, scratch, growing, report_file, seconds
                )
                growing.tail = recorded.tail
                common = common_prefix(base.diff_ids, target.diff_ids)
                full_bytes = await full_pull_bytes(self._catalogue, pair, base, target, common)
                try:
                    check_delta_size(recorded.size, full_bytes, self._max_delta_ratio)
                except DeltaTooLarge:
                    # It is proven: its current readers get its end. No other reader begins.
                    growing.finished()
                    raise
                row = self._row(pair, full_bytes, recorded, growing.name, started, fetched)
                with self._blobs.pin(row.content):
                    path = await self._blobs.adopt(out, row.content, row.delta_bytes)
                    row = await self._catalogue.publish_v2(row, self._blobs)
                    growing.finished(path)
            except BaseException as error:
                growing.failed(
                    error if isinstance(error, Exception) else WorkerFailed("it was cancelled")
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
        report_file: ReportFile,
        seconds: float,
    ) -> RecordedStream:
        def grew(size: int, rest: int | None) -> None:
            growing.grew(size, rest)
            report_file(growing)

        order = RecordingJob(
            trees[0].path, trees[1].path, docker_config(target), out, scratch, self._forecast
        )
        return await self._rsync.run(order, grew=grew, seconds=seconds)

    def _row(
        self,
        pair: Pair,
        full_bytes: int,
        recorded: RecordedStream,
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
