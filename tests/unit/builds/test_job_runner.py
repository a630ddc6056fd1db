"""Jobs of a worker for the same contents in different repositories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.inputs.pair_resolver import PairResolver
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.builds.types import Pair, Ready
from obdelta.builds.workers.build_requests import BuildRequest
from obdelta.builds.workers.job_loop import Outcome
from obdelta.builds.workers.job_runner import JobRunner
from obdelta.concurrency.reactor import IReactor
from obdelta.errors import BlobUnknown, ImageUnusable
from obdelta.oci import Digest, Form, Reference
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import DeltaRow
from tests.support.build_service import ANONYMOUS, A, B, C, World, row_of, world
from tests.support.store import real_threads
from tests.support.waiting import eventually
from tests.unit.builds.test_replicas import Others


class Now:
    """A reactor on a clock of the test, called from its own thread."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = clock.seconds

    def callFromThread(self, function: Callable[[], None]) -> None:
        function()


class Pushes:
    """A registry without deltas, which takes every batch."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, DeltaRow]] = []

    def forget_failure(self, pair: Pair) -> None:
        pass

    async def find(self, pair: Pair) -> None:
        return None

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Ready:
        self.pushed.append((pair.target.repository, row))
        return Ready(pair, row)


class Worker:
    """A worker with the builds of a world. ``pushes`` is its registry."""

    def __init__(self, w: World) -> None:
        self.w, self.pushes = w, Pushes()
        w.registry.found[C.repository] = w.registry.found[B.repository]
        lookup = ImageLookup(w.registry, w.clock, w.catalogue.named_images, w.clock.seconds)

        async def report_base(base: str) -> None:
            pass

        self.runner = JobRunner(
            reactor=cast(IReactor, Now(w.clock)),
            upstream=w.registry,
            pairs=PairResolver(lookup, w.clock),
            builders={"v2": w.builder},
            scheduler=w.service._scheduler,
            publishers={"v2": cast(BatchPublisher, self.pushes)},
            credentials=ANONYMOUS,
            push_seconds=1000.0,
            report_base=report_base,
            waited=lambda queue, seconds: None,
        )

    def take(self, target: Reference) -> Deferred[Outcome]:
        base, content = (self._digest(image) for image in (A, target))
        request = BuildRequest("v2", 1, A.repository, base, target.repository, content, Form.GZIP)
        ended: Deferred[Outcome] = Deferred()
        self.runner.start(request.as_json(), 0.0, "devices", ended.callback)
        return ended

    def _digest(self, image: Reference) -> Digest:
        manifest = self.w.registry.found[image.repository]
        assert not isinstance(manifest, Exception)
        return manifest.digest

    async def resolved(self, count: int) -> None:
        """Runs the catalogue's thread until these jobs have resolved their images."""
        await eventually("they look", lambda: self.w.registry.requests >= count)
        await self.w.catalogue.counters.all()  # its thread has done what was before


def row_in(outcome: Outcome) -> Any:
    assert outcome is not None and "row" in outcome, outcome
    return json.loads(outcome["row"])


@pytest.mark.parametrize("error", [BlobUnknown(Digest("0" * 64)), ImageUnusable("a bad layer")])
@pytest_twisted.ensureDeferred
async def test_a_build_of_another_repository_fails_for_that_one_only(
    tmp_path: Path, error: Exception
) -> None:
    async with world(tmp_path) as w:
        worker = Worker(w)
        other = worker.take(C)
        await w.until_building(1)
        own = worker.take(B)
        await worker.resolved(3)
        w.builder.finish(0, error)
        assert "error" in (await other or {})
        await w.until_building(2)
        assert w.builder.builds[1][0].target.repository == B.repository
        w.builder.finish(1)
        assert row_in(await own)["target_repository"] == B.repository
        assert [name for name, _ in worker.pushes.pushed] == [B.repository]


@pytest_twisted.ensureDeferred
async def test_a_delta_that_another_repository_had_is_not_pushed_to_this_one(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        worker, others = Worker(w), Others(w, C.repository)
        other = worker.take(C)
        await others.until_waiting(1)
        own = worker.take(B)
        await worker.resolved(3)
        (build,) = w.service.running
        forged = row_of(build.pair, b"forged")
        others.found[C.repository] = forged
        others.waiting[0].callback(None)
        assert row_in(await other)["content"] == str(forged.content)
        await w.until_building(1)
        w.builder.finish()
        assert row_in(await own)["content"] != str(forged.content)
        pushed = {name: row.content for name, row in worker.pushes.pushed}
        assert pushed[B.repository] != forged.content


@pytest_twisted.ensureDeferred
async def test_a_proven_delta_of_another_repository_is_built_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        worker = Worker(w)
        other = worker.take(C)
        await w.until_building(1)
        own = worker.take(B)
        await worker.resolved(3)
        w.builder.row = row = row_of(w.builder.builds[0][0], b"x" * 10)
        with real_threads() as threads:
            blobs = BlobStore(tmp_path / "blobs", threads)
            await blobs.put(b"x" * 10)
            await w.catalogue.publish_v2(row, blobs)
        w.builder.finish()
        assert row_in(await other)["content"] == row_in(await own)["content"]
        assert len(w.builder.builds) == 1
        assert [name for name, _ in worker.pushes.pushed] == [C.repository, B.repository]
