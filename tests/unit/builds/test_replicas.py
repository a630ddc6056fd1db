"""The service beside other servers that build: a wait for them takes no place in the queue, and
their verdicts are used here.

The other servers are a double that says what the test wants; real ones are in
tests/server/test_replicas.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from obdelta.builds.types import FullPull, Pair, Ready, Turn
from obdelta.builds.verdicts import FailedElsewhere
from obdelta.errors import Cancelled, QueueFull
from obdelta.store.catalogue.records import DeltaRow, Outcome
from tests.support.build_service import A, B, C, World, row_of, world
from tests.support.web import reactor


class Others:
    """The targets in ``busy`` are built by other replicas until the test ends that; their results
    are in ``found``.
    """

    def __init__(self, w: World, *busy: str) -> None:
        self.busy, self.waiting = set(busy), list[Deferred[None]]()
        self.found: dict[str, DeltaRow | FailedElsewhere] = {}
        self.ended: list[tuple[str, object]] = []
        self.waited: list[float] = []
        scheduler = w.service._scheduler
        scheduler._attempts.replicas = self

    async def turn(self, pair: Pair, waited: float) -> Turn | DeltaRow | None:
        self.waited.append(waited)
        found = self.found.get(pair.target.repository)
        if isinstance(found, FailedElsewhere):
            raise found
        if found is None and pair.target.repository not in self.busy:
            return Turn(pair)
        return found

    async def wait(self, pair: Pair, waited: float) -> None:
        waiter: Deferred[None] = Deferred()
        self.waiting.append(waiter)
        await waiter

    def report_end(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        self.ended.append((turn.pair.target.repository, outcome))

    async def forget(self, pair: Pair) -> None:
        pass

    async def close(self) -> None:
        pass

    async def until_waiting(self, count: int) -> None:
        while len(self.waiting) < count:
            await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_a_build_of_another_replica_takes_no_slot_here(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        others = Others(w, B.repository)
        elsewhere = w.ask(A, B)
        await others.until_waiting(1)
        here = w.ask(A, C)
        await w.until_building(1)
        (build,) = [
            build for build in w.service.running if build.pair.target.repository == B.repository
        ]
        assert build.started is None
        others.found[B.repository] = row_of(build.pair, b"y")
        others.waiting[0].callback(None)
        w.builder.finish()
        assert isinstance(await here, Ready) and isinstance(await elsewhere, Ready)
        assert [target for target, _ in others.ended] == [C.repository]


@pytest_twisted.ensureDeferred
async def test_a_build_of_a_dead_replica_is_started_here(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w, B.repository)
        request = w.ask(A, B)
        await others.until_waiting(1)
        w.clock.advance(7)
        others.waiting[0].callback(None)
        await others.until_waiting(2)
        w.clock.advance(5)
        others.busy.clear()
        others.waiting[1].callback(None)
        await w.until_building(1)
        assert others.waited == [0, 7, 12], "so that the waits are bounded all together"
        w.builder.finish()
        assert isinstance(await request, Ready)
        assert isinstance(others.ended[0][1], DeltaRow)


@pytest_twisted.ensureDeferred
async def test_a_verdict_of_another_replica_is_used_and_not_recorded_here(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w)
        others.found[B.repository] = FailedElsewhere(Outcome.PROOF_FAILED, "it does not lead there")
        for _ in range(2):
            answer = await w.ask(A, B)
            assert answer == FullPull("it does not lead there")
            await w.until_idle()
        assert w.builder.builds == [] and others.ended == []
        assert await w.catalogue.failures.all(int(w.clock.seconds()), 86400) == []
        others.found.clear()
        assert isinstance(await w.build(1, A, B), Ready)


@pytest_twisted.ensureDeferred
async def test_a_full_queue_after_a_wait_is_no_verdict_on_the_pair(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        others = Others(w, B.repository)
        request = w.ask(A, B)
        await others.until_waiting(1)
        w.ask(A, C).addErrback(lambda _: None)
        await w.until_building(1)
        w.ask(B, C).addErrback(lambda _: None)
        while w.service._scheduler.queued < 1:
            await deferLater(reactor, 0.01)
        others.waiting[0].callback(None)
        with pytest.raises(QueueFull):
            await request
        pair = w.builder.builds[0][0]
        now = int(w.clock.seconds())
        assert await w.catalogue.failures.all(now, 86400) == [], pair


@pytest_twisted.ensureDeferred
async def test_a_stop_cancels_waits_for_other_replicas(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w, B.repository)
        request = w.ask(A, B)
        await others.until_waiting(1)
        await w.service.close()
        with pytest.raises((Cancelled, CancelledError)):
            await request
        assert w.service.running == []
