"""The scheduler: limits, priorities and fair shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from obdelta.builds import scheduler
from obdelta.builds.failures import Failures
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.queue import FairQueue, Priority
from obdelta.builds.rebuild import Rebuild
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import (
    Pair,
    Ready,
    Report,
)
from obdelta.concurrency.limits import Limit
from obdelta.concurrency.tasks import Threads
from obdelta.errors import (
    BuildTimedOut,
    QueueFull,
    WorkerFailed,
)
from obdelta.oci import (
    ImageNames,
    Reference,
)
from obdelta.store.catalogue.evictions import Evicted
from obdelta.store.catalogue.records import DeltaRow, Kind
from tests.support.build_service import (
    ANONYMOUS,
    A,
    B,
    C,
    D,
    E,
    F,
    FreeSpace,
    G,
    H,
    World,
    manifest_of,
    row_of,
    world,
)
from tests.support.logs import logged
from tests.support.waiting import eventually
from tests.support.web import reactor


@pytest_twisted.ensureDeferred
async def test_builds_beyond_the_limit_queue(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        first, second = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        assert len(w.builder.builds) == 1
        w.builder.finish()
        assert isinstance(await first, Ready)
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await second, Ready)


@pytest_twisted.ensureDeferred
async def test_the_outcome_is_logged_with_the_names_of_the_images(tmp_path: Path) -> None:
    """At the line's end, in quotes: an image that names itself ``outcome=ready`` deceives
    no one.
    """
    async with world(tmp_path) as w:
        forged = ImageNames("x' outcome=ready", "web", "2.0")
        await w.catalogue.named_images.record(manifest_of(B.repository).digest, forged, 1.0)
        with logged("info", "warn") as lines:
            await w.build(1)
            await w.catalogue.named_images.record(
                manifest_of(A.repository).digest, ImageNames("acme", "web", "1.9", "c0ffee"), 1.0
            )
            await w.build(2, B, A, BuildTimedOut("too slow"))
            await w.build(3, C, D)
        first, second, third = [line for line in lines if line.startswith("build: pair=")]
        assert first.endswith(""" seconds=0.00 target="x' outcome=ready/web 2.0\"""")
        assert second.endswith(
            """ base="x' outcome=ready/web 2.0" target='acme/web 1.9 (c0ffee)'"""
        )
        assert third.endswith(" seconds=0.00")


@pytest_twisted.ensureDeferred
async def test_a_second_attempt_waits_for_its_turn(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        request, queued = w.ask(wait=9000), w.ask(A, C, wait=9000)
        await w.until_building(1)
        await w.waiting(2)
        w.clock.advance(100)
        w.builder.finish(error=WorkerFailed("killed"))
        await w.until_building(2)
        assert w.builder.builds[0][0] != w.builder.builds[1][0], "the one that waited comes first"
        assert [build.started is None for build in w.service.running] == [True, False]
        w.builder.finish()
        assert isinstance(await queued, Ready)
        await w.until_building(3)
        w.builder.finish()
        assert isinstance(await request, Ready)
        assert w.builder.low_memory == [False, False, True]


class OtherMachines:
    """A double of ``obdelta worker`` processes: each build waits until the test ends it."""

    def __init__(self, clock: Clock) -> None:
        self.queue = FairQueue(8, 0, clock)
        self.builds: list[Deferred[None]] = []

    async def build(self, build: RunningBuild, report: Report) -> DeltaRow:
        go: Deferred[None] = Deferred()
        self.builds.append(go)
        await go
        return row_of(build.pair)


@pytest.mark.parametrize("kind", ["v2", "v3"])
@pytest_twisted.ensureDeferred
async def test_builds_of_workers_take_no_slot_of_those_here(kind: Kind, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        workers = OtherMachines(w.clock)
        made = scheduler.Scheduler(
            clock=w.clock,
            catalogue=w.catalogue,
            failures=Failures(w.catalogue, 600, w.clock.seconds),
            queue=FairQueue(1, 0, w.clock),
            limit=Limit(0, "builds of one client"),
            build_seconds=1800,
            space=FreeSpace(w.make_room),
            workers=workers,
        )

        def start(base: Reference, target: Reference, *, again: bool = False) -> RunningBuild:
            first, last = (
                ResolvedImage(one.repository, manifest_of(one.repository)) for one in (base, target)
            )
            pair = Pair(kind, 1, first, last)
            evicted = Evicted(row_of(pair), (), "", {})
            rebuild = Rebuild(evicted, Threads(reactor, reactor.getThreadPool())) if again else None
            return made.start(pair, w.builder, ANONYMOUS, None, rebuild)

        handed_over = [start(A, target) for target in (B, C, D)]
        here = [start(E, target, again=True) for target in (F, G, H)]
        while len(workers.builds) < 3 or not w.builder.builds:
            await deferLater(reactor, 0.01)
        assert len(w.builder.builds) == 1, "max-builds of this server"
        assert made.queued == 2
        workers.queue.resize(100)
        w.builder.finish()
        await w.until_building(2)
        assert made.queued == 1
        for go in workers.builds:
            go.callback(None)
        for build in handed_over:
            assert (await made.wait(build, 9000)).key == build.pair.key
        w.builder.finish()
        await w.until_building(3)
        w.builder.finish()
        for build in here:
            await made.wait(build, 9000)


@pytest_twisted.ensureDeferred
async def test_a_full_queue_is_a_transient_error(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        first, second = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        with pytest.raises(QueueFull):
            await w.ask(B, C)
        # A client that joins a build takes no place in the queue.
        joined = w.ask(A, C)
        await w.waiting(3)
        w.builder.finish()
        await w.until_building(2)
        third = w.ask(B, C)
        await w.waiting(2)
        w.builder.finish()
        await w.until_building(3)
        w.builder.finish()
        assert [type(await one) for one in (first, second, joined, third)] == [Ready] * 4


async def until_queued(w: World, *pairs: tuple[Reference, Reference]) -> None:
    """Runs the catalogue's thread until just these builds are queued."""
    wanted = {(base.repository, target.repository) for base, target in pairs}

    def queued() -> set[tuple[str, str]]:
        pairs = [build.pair for build in w.service.running if build.started is None]
        return {(pair.base.repository, pair.target.repository) for pair in pairs}

    await eventually(f"{wanted} are queued", lambda: queued() == wanted and w.builder.builds)


@pytest_twisted.ensureDeferred
async def test_a_full_queue_drops_the_last_entry_of_the_longest_queue(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=4) as w:
        running = w.ask(A, B, subject="hostile")
        await w.until_building(1)
        hostile = [w.ask(A, target, subject="hostile") for target in (C, D)]
        await until_queued(w, (A, C), (A, D))
        other = w.ask(B, C, subject="other")
        await until_queued(w, (A, C), (B, C))
        with pytest.raises(QueueFull):
            await hostile[
                1
            ]  # one fleet gets at most half of the queue; the hostile fleet's was the longer one
        second = [w.ask(E, F, subject="device 1"), w.ask(F, E, subject="device 2")]
        await until_queued(w, (A, C), (B, C), (E, F), (F, E))
        newcomer = w.ask(G, H, subject="device 3")
        await until_queued(w, (A, C), (B, C), (E, F), (G, H))
        with pytest.raises(QueueFull):
            await second[1]
        assert await w.catalogue.failures.all(int(w.clock.seconds()), 86400) == [], (
            "it says nothing of the pairs"
        )
        for count in range(1, 6):
            await w.until_building(count)
            w.builder.finish()
        assert [type(await one) for one in (running, hostile[0], other, second[0], newcomer)] == [
            Ready
        ] * 5


@pytest_twisted.ensureDeferred
async def test_a_subject_with_many_targets_delays_no_other(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=2) as w:
        hostile = [w.ask(A, target, subject="hostile") for target in (B, C, D)]
        hostile += [w.ask(B, target, subject="hostile") for target in (A, C, D)]
        await w.until_building(2)
        device = w.ask(E, F, subject="device")
        await w.waiting(7)
        w.builder.finish(0)
        await w.until_building(3)
        assert w.builder.builds[2][0].target.repository == F.repository
        w.builder.finish(2)
        assert isinstance(await device, Ready)
        await w.service.close()
        for one in hostile:
            one.addErrback(lambda _: None)


@pytest_twisted.ensureDeferred
async def test_a_client_that_joins_a_queued_build_raises_its_priority(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        requests = [w.ask(A, B, subject="first")]
        await w.until_building(1)
        requests.append(w.ask(A, C, subject="builder", priority=Priority.UNPRIVILEGED))
        await until_queued(w, (A, C))
        requests.append(w.ask(A, D, subject="operators", priority=Priority.PREPARED))
        await until_queued(w, (A, C), (A, D))
        requests.append(w.ask(A, E, subject="first"))
        await until_queued(w, (A, C), (A, D), (A, E))
        requests.append(w.ask(A, C, subject="device"))
        await w.waiting(5)
        for count, target in enumerate((B, C, E, D), 1):
            await w.until_building(count)
            assert w.builder.builds[-1][0].target.repository == target.repository
            w.builder.finish()
        assert [type(await one) for one in requests] == [Ready] * 5


@pytest_twisted.ensureDeferred
async def test_a_token_that_grants_nothing_connects_no_fleets(tmp_path: Path) -> None:
    """A client that has one could otherwise make one fleet of all, and none would have a share of
    its own.
    """
    async with world(tmp_path) as w:
        request = w.ask(A, B, subject="builder", priority=Priority.UNPRIVILEGED)
        await w.until_building(1)
        fleets = w.service._scheduler._fleets
        assert fleets.of(A.repository, A.repository) != fleets.of(B.repository, B.repository)
        w.builder.finish()
        assert isinstance(await request, Ready)


@pytest_twisted.ensureDeferred
async def test_a_client_over_its_limit_of_builds_waits_too(tmp_path: Path) -> None:
    async with world(tmp_path, client_limit=1) as w:
        first = w.ask(A, B)
        await w.waiting(1)
        with pytest.raises(QueueFull):
            await w.ask(A, C)
        w.builder.finish()
        assert isinstance(await first, Ready)
