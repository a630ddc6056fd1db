"""The two forms of a delta: which one is built first, when the other one is built, and what one
says about the other: verdicts, queued builds, answers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater

from obdelta.builds.publish.other_forms import AGAIN_SECONDS, MIN_DEVICES
from obdelta.builds.queue import Priority
from obdelta.builds.types import Answer, DeltaTooLarge, FullPull, GzipCostsLess, Ready
from obdelta.errors import ProofFailed, Unauthorized, WorkerFailed
from obdelta.oci import Form
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from tests.support.build_service import (
    ANONYMOUS,
    A,
    B,
    C,
    D,
    E,
    World,
    manifest_of,
    world,
)
from tests.support.store import real_threads
from tests.support.web import reactor

BASE, TARGET = (manifest_of(image.repository).digest for image in (A, B))


class Setting:
    """A service whose setting ``delta-compression`` makes these forms."""

    def __init__(self, w: World, *forms: Form, **options: Any) -> None:
        self.world = w
        self.service = w.v3_service(*forms, **{"max_builds": 2, **options})

    def ask(self, form: Form | None, priority: Priority = Priority.DEVICE) -> Deferred[Answer]:
        return ensureDeferred(
            self.service.delta("v3", A, B, ANONYMOUS, 45.0, priority=priority, form=form)
        )

    async def until_building(self, *forms: Form) -> None:
        """Waits until builds of these forms have begun, in this order, and no others."""
        await self.world.until_building(len(forms))
        assert [pair.form for pair, _ in self.world.builder.builds] == list(forms)

    async def publish(self, folder: Path, form: Form, **changed: Any) -> None:
        await self.world.publish_v3(folder, form, **changed)

    async def until_idle(self) -> None:
        """Waits until no build is queued or under way."""
        while self.service.running:
            await deferLater(reactor, 0.01, lambda: None)

    async def until_considered(self) -> None:
        """Waits for the decision whether the other form is built."""
        other_forms = self.service._other_forms
        assert other_forms is not None
        while other_forms._tasks:
            await deferLater(reactor, 0.01, lambda: None)

    async def fails(self, form: Form, error: Exception, builds: int) -> None:
        """Lets a client of this form start the build with this number, which fails."""
        request = self.ask(form)
        await self.world.until_building(builds)
        self.world.builder.finish(error=error)
        assert isinstance(await request, FullPull)


@asynccontextmanager
async def setting(tmp_path: Path, *forms: Form, **options: Any) -> AsyncIterator[Setting]:
    async with world(tmp_path) as w:
        made = Setting(w, *forms, **options)
        try:
            yield made
        finally:
            await made.service.close()


@pytest_twisted.ensureDeferred
async def test_a_form_that_is_too_large_does_not_prevent_the_other(tmp_path: Path) -> None:
    async with setting(tmp_path, Form.ZSTD) as made:
        await made.fails(Form.ZSTD, DeltaTooLarge(95, 100), 1)
        assert isinstance(await made.ask(Form.ZSTD), FullPull)
        await made.fails(Form.GZIP, DeltaTooLarge(96, 100), 2)
        pair, _ = made.world.builder.builds[1]
        assert pair.form is Form.GZIP
        for form in Form:
            assert isinstance(await made.ask(form), FullPull)
        assert len(made.world.builder.builds) == 2
        failures = await made.world.catalogue.failures.all(int(made.world.clock.seconds()), 86400)
        assert {failure.form for failure in failures} == set(Form)


@pytest_twisted.ensureDeferred
async def test_a_too_large_gzip_form_is_no_verdict_once_zstd_is_built(tmp_path: Path) -> None:
    """The setting changed from gzip to zstd, or to auto."""
    async with setting(tmp_path, Form.GZIP) as made:
        for form in Form:  # engines that read zstd get gzip, too
            builds = len(made.world.builder.builds)
            if form is Form.GZIP:
                await made.fails(form, DeltaTooLarge(95, 100), builds + 1)
            else:
                assert isinstance(await made.ask(form), FullPull)
        made.world.builder.forms = (Form.ZSTD,)
        assert isinstance(await made.ask(Form.GZIP), FullPull)
        request = made.ask(Form.ZSTD)
        await made.world.until_building(2)
        pair, _ = made.world.builder.builds[1]
        assert pair.form is Form.ZSTD
        made.world.builder.finish(error=DeltaTooLarge(95, 100))
        await request


@pytest_twisted.ensureDeferred
async def test_a_verdict_on_all_forms_is_remembered_for_each(tmp_path: Path) -> None:
    """The images themselves are unusable."""
    async with setting(tmp_path, Form.ZSTD) as made:
        request = made.ask(Form.ZSTD)
        for attempt in range(2):
            await made.world.until_building(attempt + 1)
            made.world.builder.finish(error=ProofFailed("layer 3", "other bytes"))
        assert isinstance(await request, FullPull)
        builds = len(made.world.builder.builds)
        for form in Form:
            assert isinstance(await made.ask(form), FullPull)
        assert len(made.world.builder.builds) == builds


@pytest_twisted.ensureDeferred
async def test_a_gzip_form_that_exists_is_served_where_zstd_is_too_large(tmp_path: Path) -> None:
    """Once, this was a full pull for the newer engines, although they read gzip."""
    async with setting(tmp_path, Form.ZSTD) as made:
        await made.fails(Form.ZSTD, DeltaTooLarge(95, 100), 1)
        key = await made.world.publish_v3(tmp_path, Form.GZIP)
        for form in Form:
            answer = await made.ask(form)
            assert isinstance(answer, Ready) and answer.delta.key == key
        assert len(made.world.builder.builds) == 1


@pytest_twisted.ensureDeferred
async def test_a_client_gets_gzip_where_zstd_that_it_waited_for_costs_more(tmp_path: Path) -> None:
    async with setting(tmp_path, *Form) as made:
        request = made.ask(Form.ZSTD)
        await made.until_building(Form.ZSTD)
        await made.publish(tmp_path, Form.GZIP)
        made.world.builder.finish(error=GzipCostsLess())
        for answer in (await request, await made.ask(Form.ZSTD), await made.ask(Form.GZIP)):
            assert isinstance(answer, Ready) and answer.delta.key.form is Form.GZIP
        with real_threads() as threads:
            gone = DeltaKey("v3", 1, BASE, TARGET, Form.GZIP)
            await made.world.catalogue.remove([gone], BlobStore(tmp_path, threads))
        # The verdict is on zstd alone.
        assert isinstance(await made.ask(Form.ZSTD), FullPull)
        again = made.ask(Form.GZIP)
        await made.until_building(Form.ZSTD, Form.GZIP)
        made.world.builder.finish()
        assert isinstance(await again, Ready)


@pytest_twisted.ensureDeferred
async def test_each_form_of_a_pair_is_queued_and_resumed_by_itself(tmp_path: Path) -> None:
    """Once, a restart resumed zstd for the old engine, and the end of one build removed the record
    of the other.
    """
    async with setting(tmp_path, Form.ZSTD) as made:
        # One that reads both would wait for a build of gzip.
        request = {}
        for number, form in enumerate((Form.ZSTD, Form.GZIP), 1):
            request[form] = made.ask(form)
            await made.world.until_building(number)
        number_of = {pair.form: n for n, (pair, _) in enumerate(made.world.builder.builds)}
        made.world.builder.finish(number_of[Form.ZSTD], DeltaTooLarge(95, 100))
        await request[Form.ZSTD]
        pending = made.world.catalogue.pending_builds
        left, _ = await pending.take_all(9)
        assert [build.form for build in left] == [Form.GZIP]
        made.world.builder.finish(number_of[Form.GZIP], DeltaTooLarge(95, 100))
        await request[Form.GZIP]
        assert (await pending.take_all(9))[0] == []
    (tmp_path / "again").mkdir()
    async with setting(tmp_path / "again", Form.ZSTD) as made:
        await made.world.catalogue.pending_builds.note(
            PendingBuild("v3", A.repository, BASE, B.repository, TARGET, 1, Form.GZIP)
        )
        assert await made.service.resume(ANONYMOUS) == 1
        await made.world.until_building(1)
        pair, _ = made.world.builder.builds[0]
        assert pair.form is Form.GZIP


# -- the first form, and the other one ---------------------------------------------------------


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
        GzipCostsLess(),
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
