"""The other form of a delta: it is built after the first one, if devices read it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import ensureDeferred

from obdelta.builds.delta_size_limit import DeltaTooLarge, OtherFormCostsLess
from obdelta.builds.publish.other_forms import AGAIN_SECONDS, MIN_DEVICES
from obdelta.builds.queue import Priority
from obdelta.builds.types import FullPull, Ready
from obdelta.errors import ProofFailed, Unauthorized, WorkerFailed
from obdelta.oci import Form
from tests.support.build_service import ANONYMOUS, A, B, C, D, E
from tests.support.form_builds import Setting, setting


@pytest.mark.parametrize("first", Form)
@pytest_twisted.ensureDeferred
async def test_the_answer_waits_for_one_form_and_the_other_is_built_afterwards(
    first: Form, tmp_path: Path
) -> None:
    (other,) = set(Form) - {first}
    async with setting(tmp_path, *Form, both_forms=True) as made:
        request = made.ask(first)
        await made.until_building(first)
        assert len(made.service.running) == 1
        await made.publish(tmp_path, first)
        made.world.builder.finish()
        answer = await request
        assert isinstance(answer, Ready) and answer.delta.key.form is first
        await made.until_building(first, other)
        (build,) = made.service.running
        assert build.waiting == 0 and build.entry.owner.priority is Priority.PREPARED
        left, _ = await made.world.catalogue.pending_builds.take_all(9)
        assert [queued.form for queued in left] == [other], "a restart resumes it"
        await made.publish(tmp_path, other)
        made.world.builder.finish()
        await made.until_idle()
        await made.until_considered()
        assert made.service.running == [] and len(made.world.builder.builds) == 2


@pytest_twisted.ensureDeferred
async def test_a_client_of_the_other_form_waits_for_it_and_comes_first_then(tmp_path: Path) -> None:
    """Its engine reads gzip only. A client that reads both has its answer."""
    async with setting(tmp_path, *Form, both_forms=True, max_builds=1) as made:
        request = made.ask(Form.ZSTD)
        await made.until_building(Form.ZSTD)
        await made.publish(tmp_path, Form.ZSTD)
        made.world.builder.finish()
        assert isinstance(await request, Ready)
        await made.until_building(Form.ZSTD, Form.GZIP)
        waiting = made.ask(Form.GZIP)
        (build,) = made.service.running
        await made.world.until_waiting(made.service, 1)
        assert build.entry.owner.priority is Priority.DEVICE
        assert isinstance(await made.ask(Form.ZSTD), Ready)
        assert not waiting.called
        made.world.builder.finish()
        answer = await waiting
        assert isinstance(answer, Ready) and answer.delta.key.form is Form.GZIP


@pytest_twisted.ensureDeferred
async def test_a_client_that_reads_both_joins_the_build_of_gzip(tmp_path: Path) -> None:
    async with setting(tmp_path, *Form) as made:
        first = made.ask(Form.GZIP)
        await made.until_building(Form.GZIP)
        second = made.ask(Form.ZSTD)
        await made.world.until_waiting(made.service, 2)
        made.world.builder.finish()
        for request in (first, second):
            answer = await request
            assert isinstance(answer, Ready) and answer.delta.key.form is Form.GZIP
        assert len(made.world.builder.builds) == 1


@pytest_twisted.ensureDeferred
async def test_gzip_that_is_too_large_leads_a_client_that_reads_both_to_zstd(
    tmp_path: Path,
) -> None:
    async with setting(tmp_path, *Form) as made:
        first = made.ask(Form.GZIP)
        await made.until_building(Form.GZIP)
        second = made.ask(Form.ZSTD)
        await made.world.until_waiting(made.service, 2)
        made.world.builder.finish(error=DeltaTooLarge(95, 100))
        assert isinstance(await first, FullPull)
        await made.until_building(Form.GZIP, Form.ZSTD)
        made.world.builder.finish()
        answer = await second
        assert isinstance(answer, Ready) and answer.delta.key.form is Form.ZSTD


@pytest.mark.parametrize(
    "error",
    [
        DeltaTooLarge(95, 100),
        OtherFormCostsLess(Form.ZSTD, Form.GZIP),
        ProofFailed("layer 3", "other bytes"),
        WorkerFailed("out of memory"),
        Unauthorized("the token has expired"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest_twisted.ensureDeferred
async def test_a_failure_of_the_other_form_alone_costs_the_first_one_nothing(
    error: Exception, tmp_path: Path
) -> None:
    async with setting(tmp_path, *Form, both_forms=True) as made:
        await made.publish(tmp_path, Form.GZIP)
        assert isinstance(await made.ask(Form.ZSTD), Ready)
        attempts = 2 if isinstance(error, ProofFailed | WorkerFailed) else 1
        for attempt in range(1, attempts + 1):
            await made.until_building(*[Form.ZSTD] * attempt)
            made.world.builder.finish(error=error)
        await made.until_idle()
        for form in Form:
            answer = await made.ask(form)
            assert isinstance(answer, Ready) and answer.delta.key.form is Form.GZIP
        await made.until_considered()
        assert len(made.world.builder.builds) == attempts, "not again for each device"
        # A failure that was the client's own leaves no trace.
        made.world.clock.advance(AGAIN_SECONDS)
        assert isinstance(await made.ask(Form.ZSTD), Ready)
        await made.until_considered()
        assert (len(made.service.running) == 1) == isinstance(error, WorkerFailed | Unauthorized)


async def see(made: Setting, tmp_path: Path, form: Form, devices: int) -> None:
    """Records downloads of the target by this number of devices of this form."""
    assert (await made.world.catalogue.device_downloads.engines("", "")) == {}
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        connection.executemany(
            "INSERT INTO device_downloads (device, layer, base_repository, target_repository,"
            " engine, size, commands, target_size, seconds, last)"
            " VALUES (?, ?, ?, ?, ?, 9, 9, 9, 9, 9)",
            [
                (f"{form.value}{n:060}", "a" * 64, A.repository, B.repository, form.value)
                for n in range(devices)
            ],
        )
        connection.commit()


@pytest.mark.parametrize(
    ("missing", "seen", "published", "built"),
    [
        (Form.ZSTD, {}, {}, True),
        (Form.GZIP, {}, {}, True),
        # The native builder could not build it.
        (Form.ZSTD, {}, {"details": {"builder": "balena-engine"}}, False),
        # Every device that was seen reads the form that there is.
        (Form.ZSTD, {Form.GZIP: MIN_DEVICES}, {}, False),
        (Form.GZIP, {Form.ZSTD: MIN_DEVICES}, {}, False),
        (Form.GZIP, {Form.ZSTD: MIN_DEVICES - 1}, {}, True),
        (Form.ZSTD, {Form.GZIP: MIN_DEVICES, Form.ZSTD: 1}, {}, True),
        (Form.GZIP, {Form.ZSTD: MIN_DEVICES, Form.GZIP: 1}, {}, True),
    ],
)
@pytest_twisted.ensureDeferred
async def test_the_other_form_is_built_where_it_is_worth_it(
    missing: Form, seen: dict[Form, int], published: dict[str, Any], built: bool, tmp_path: Path
) -> None:
    (there,) = set(Form) - {missing}
    async with setting(tmp_path, *Form, both_forms=True) as made:
        for form, devices in seen.items():
            await see(made, tmp_path, form, devices)
        request = made.ask(there)
        await made.until_building(there)
        await made.publish(tmp_path, there, **published)
        made.world.builder.finish()
        assert isinstance(await request, Ready)
        await made.until_considered()
        assert [build.pair.form for build in made.service.running] == [missing] * built


@pytest_twisted.ensureDeferred
async def test_a_client_that_tells_nothing_gets_what_devices_of_its_update_read(
    tmp_path: Path,
) -> None:
    async with setting(tmp_path, *Form, both_forms=True, max_builds=9) as made:
        request = made.ask(None)
        await made.until_building(Form.GZIP)
        made.world.builder.finish(error=DeltaTooLarge(95, 100))
        await request
        await see(made, tmp_path, Form.ZSTD, 2)
        request = made.ask(None)
        await made.until_building(Form.GZIP, Form.ZSTD)
        made.world.builder.finish(error=DeltaTooLarge(95, 100))
        await request


@pytest_twisted.ensureDeferred
async def test_a_builder_without_rights_gets_no_better_standing_by_the_other_form(
    tmp_path: Path,
) -> None:
    async with setting(tmp_path, *Form, both_forms=True, max_builds=1) as made:
        request = made.ask(Form.GZIP, Priority.UNPRIVILEGED)
        await made.until_building(Form.GZIP)
        made.world.builder.finish()
        await request
        await made.until_building(Form.GZIP, Form.ZSTD)
        (build,) = made.service.running
        assert build.entry.owner.priority is Priority.UNPRIVILEGED


@pytest_twisted.ensureDeferred
async def test_no_other_form_is_queued_where_the_queue_is_full(tmp_path: Path) -> None:
    async with setting(tmp_path, *Form, both_forms=True, max_builds=1, max_queue=4) as made:
        waiting = [
            ensureDeferred(made.service.delta("v3", A, target, ANONYMOUS, 45.0, form=Form.GZIP))
            for target in (C, D, E)
        ]
        await made.world.until_waiting(made.service, 3)
        await made.publish(tmp_path, Form.GZIP)
        assert isinstance(await made.ask(Form.ZSTD), Ready)
        await made.until_considered()
        assert [build.pair.form for build in made.service.running] == [Form.GZIP] * 3
        for each in waiting:
            each.addErrback(lambda _: None)
