"""Builds when a server stops and starts: resumed, drained, cancelled, recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred

from obdelta.builds import scheduler
from obdelta.builds.types import (
    Ready,
)
from obdelta.errors import (
    Cancelled,
    ObdeltaError,
)
from obdelta.oci import (
    Form,
)
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from tests.support.build_service import (
    ANONYMOUS,
    A,
    B,
    C,
    D,
    E,
    F,
    world,
)
from tests.support.web import reactor


@pytest_twisted.ensureDeferred
async def test_closing_cancels_builds(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        await w.waiting(1)
        await w.service.close()
        with pytest.raises(ObdeltaError, match="stopping"):
            await request
        assert w.builder.cancelled == 1
        with pytest.raises(ObdeltaError, match="stopping"):
            await w.ask(A, C)


@pytest_twisted.ensureDeferred
async def test_resumed_builds_wait_behind_devices_until_these_request_them(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        for target in (B, C, D):
            w.ask(A, target, subject="hostile").addErrback(lambda _: None)
        w.ask(E, F, subject="device").addErrback(lambda _: None)
        await w.waiting(4)
        await w.service.close()
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        assert await w.service.resume(ANONYMOUS) == 4, "the bounds hold for new builds"
        await w.until_building(1)
        again = w.ask(E, F, subject="device")
        await w.waiting(1)
        w.builder.finish()
        await w.until_building(2)
        assert w.builder.builds[-1][0].target.repository == F.repository
        w.builder.finish()
        assert isinstance(await again, Ready)


@pytest_twisted.ensureDeferred
async def test_queued_builds_are_resumed_after_a_restart(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        requests = [w.ask(A, B), w.ask(A, C)]
        await w.waiting(2)
        await w.service.close()
        for one in requests:
            with pytest.raises(Cancelled):
                await one
    async with world(tmp_path, max_builds=1) as w:
        assert await w.service.resume(ANONYMOUS) == 2
        for count, target in ((1, B), (2, C)):
            await w.until_building(count)
            assert w.builder.builds[-1][0].target.repository == target.repository
            w.builder.finish()
        await w.until_idle()
    async with world(tmp_path) as w:
        assert await w.service.resume(ANONYMOUS) == 0


@pytest_twisted.ensureDeferred
async def test_a_queued_build_that_only_a_device_may_have_is_dropped(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        await w.waiting(1)
        await w.service.close()
        with pytest.raises(Cancelled):
            await request
    async with world(tmp_path) as w:
        w.registry.allowed = {"a device's"}
        assert await w.service.resume(ANONYMOUS) == 0
        assert await w.catalogue.counters.all() == {"queue.dropped": 1}
        w.registry.allowed = None
        assert await w.service.resume(ANONYMOUS) == 0


@pytest_twisted.ensureDeferred
async def test_a_build_that_repeatedly_ends_the_process_is_dropped(tmp_path: Path) -> None:
    for start in range(4):
        async with world(tmp_path) as w:
            if start:
                assert await w.service.resume(ANONYMOUS) == int(start < 3)
            else:
                request = w.ask()
                await w.waiting(1)
                request.addErrback(lambda _: None)
            await w.service.close()


@pytest_twisted.ensureDeferred
async def test_draining_finishes_running_builds_and_keeps_queued_ones(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        runs, waits = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        drained = ensureDeferred(w.service.drain(30))
        with pytest.raises(Cancelled):
            await waits
        assert not drained.called
        w.builder.finish()
        assert isinstance(await runs, Ready)
        await drained
    async with world(tmp_path) as w:
        assert await w.service.resume(ANONYMOUS) == 1
        await w.until_building(1)
        assert w.builder.builds[0][0].target.repository == C.repository
        drained = ensureDeferred(w.service.drain(30))
        w.clock.advance(31)
        await drained
        assert len(w.service.running) == 1


@pytest_twisted.ensureDeferred
async def test_closing_while_a_result_is_recorded_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        await w.until_building(1)
        recorded: Deferred[None] = Deferred()

        async def forget(build: PendingBuild) -> None:
            await recorded

        monkeypatch.setattr(w.catalogue.pending_builds, "forget", forget)
        w.builder.finish()
        await ensureDeferred(w.service.close()).addTimeout(10, reactor)
        assert isinstance(await request, Ready)


@pytest_twisted.ensureDeferred
async def test_a_result_that_cannot_be_recorded_still_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, an unexpected error left the build in the list of running ones, and closing never
    ended.
    """
    async with world(tmp_path) as w:
        request = w.ask()
        await w.until_building(1)

        async def forget(build: PendingBuild) -> None:
            raise RuntimeError("unexpected")

        monkeypatch.setattr(w.catalogue.pending_builds, "forget", forget)
        w.builder.finish()
        assert isinstance(await request, Ready)
        assert w.service.running == []
        await ensureDeferred(w.service.close()).addTimeout(10, reactor)


@pytest_twisted.ensureDeferred
async def test_an_unexpected_error_while_a_build_ends_leaves_no_running_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(scheduler, "log_end", fail)
    async with world(tmp_path, client_limit=1) as w:
        request = w.ask(wait=10)
        await w.until_building(1)
        w.builder.finish()
        with pytest.raises(RuntimeError):
            await request
        assert w.service.running == []
        monkeypatch.undo()
        # The client's limit of one build is free again.
        assert isinstance(await w.build(2, A, C), Ready)
        await ensureDeferred(w.service.close()).addTimeout(10, reactor)


@pytest_twisted.ensureDeferred
async def test_a_form_that_was_queued_is_resumed_beside_the_one_that_is_ready(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        service = w.v3_service(Form.GZIP, Form.ZSTD, max_builds=1)
        key = await w.publish_v3(tmp_path, Form.GZIP)
        for form in Form:
            await w.catalogue.pending_builds.note(
                PendingBuild("v3", A.repository, key.base, B.repository, key.target, 1, form)
            )
        assert await service.resume(ANONYMOUS) == 2
        await w.until_building(1)
        pair, _ = w.builder.builds[0]
        assert pair.form is Form.ZSTD
        await service.close()
