"""The coordinator where other servers build, too: what is waited for costs nobody's place, and a
verdict is taken over. The other servers are a double that says what the test wants; real ones are
in tests/server/test_replicas.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from obdelta.builds.replicas.turns import Turn
from obdelta.builds.service import FullPull, Ready
from obdelta.builds.types import Pair
from obdelta.builds.verdicts import FailedElsewhere
from obdelta.errors import Cancelled, QueueFull
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaRow, Outcome
from tests.support.web import reactor
from tests.unit.builds.test_service import A, B, C, World, world


class Others:
    """The targets in ``busy`` are being built elsewhere, until the test says otherwise; what was
    found there is in ``found``.
    """

    def __init__(self, w: World, *busy: str) -> None:
        self.busy, self.waiting = set(busy), list[Deferred[None]]()
        self.found: dict[str, DeltaRow | FailedElsewhere] = {}
        self.ended: list[tuple[str, object]] = []
        self.waited: list[float] = []
        w.coordinator._replicas = self

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

    def over(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        self.ended.append((turn.pair.target.repository, outcome))

    async def close(self) -> None:
        pass

    async def until_waiting(self, count: int) -> None:
        while len(self.waiting) < count:
            await deferLater(reactor, 0.01)


def row_of(pair: Pair) -> DeltaRow:
    return DeltaRow(
        pair.key,
        pair.base.repository,
        pair.target.repository,
        None,
        Digest.of(b"y"),
        100,
        10,
        1.0,
        1,
    )


@pytest_twisted.ensureDeferred
async def test_what_another_builds_costs_no_place_here(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        others = Others(w, B.repository)
        elsewhere = w.ask(A, B)
        await others.until_waiting(1)
        here = w.ask(A, C)
        await w.until_building(1)
        (build,) = [
            build for build in w.coordinator.running if build.pair.target.repository == B.repository
        ]
        assert build.started is None
        others.found[B.repository] = row_of(build.pair)
        others.waiting[0].callback(None)
        w.builder.finish()
        assert isinstance(await here, Ready) and isinstance(await elsewhere, Ready)
        assert [target for target, _ in others.ended] == [C.repository]


@pytest_twisted.ensureDeferred
async def test_who_is_dead_is_replaced(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w, B.repository)
        asked = w.ask(A, B)
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
        assert isinstance(await asked, Ready)
        assert isinstance(others.ended[0][1], DeltaRow)


@pytest_twisted.ensureDeferred
async def test_a_verdict_is_taken_over_and_survives_its_key_nowhere(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w)
        others.found[B.repository] = FailedElsewhere(Outcome.PROOF_FAILED, "it does not lead there")
        for _ in range(2):
            answer = await w.ask(A, B)
            assert answer == FullPull("it does not lead there")
            await w.until_idle()
        assert w.builder.builds == [] and others.ended == []
        assert await w.catalogue.failures(int(w.clock.seconds()), 86400) == []
        others.found.clear()
        asked = w.ask(A, B)
        await w.until_building(1)
        w.builder.finish()
        assert isinstance(await asked, Ready)


@pytest_twisted.ensureDeferred
async def test_a_full_queue_after_a_wait_says_nothing_of_the_pair(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        others = Others(w, B.repository)
        asked = w.ask(A, B)
        await others.until_waiting(1)
        w.ask(A, C).addErrback(lambda _: None)
        await w.until_building(1)
        w.ask(B, C).addErrback(lambda _: None)
        while w.coordinator.waiting < 1:
            await deferLater(reactor, 0.01)
        others.waiting[0].callback(None)
        with pytest.raises(QueueFull):
            await asked
        pair = w.builder.builds[0][0]
        now = int(w.clock.seconds())
        assert await w.catalogue.failures(now, 86400) == [], pair


@pytest_twisted.ensureDeferred
async def test_an_end_calls_off_what_waits_for_others(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        others = Others(w, B.repository)
        asked = w.ask(A, B)
        await others.until_waiting(1)
        await w.coordinator.close()
        with pytest.raises((Cancelled, CancelledError)):
            await asked
        assert w.coordinator.running == []
