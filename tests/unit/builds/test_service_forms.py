"""The two forms of a delta: what one says about the other: verdicts, queued builds, answers."""

from __future__ import annotations

from pathlib import Path

import pytest_twisted

from obdelta.builds.delta_size_limit import DeltaTooLarge, OtherFormCostsLess
from obdelta.builds.types import FullPull, Ready
from obdelta.errors import ProofFailed
from obdelta.oci import Form
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.catalogue.tables.pending_builds import PendingBuild
from tests.support.build_service import ANONYMOUS, A, B, manifest_of
from tests.support.form_builds import setting
from tests.support.store import real_threads

BASE, TARGET = (manifest_of(image.repository).digest for image in (A, B))


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
        made.world.builder.finish(error=OtherFormCostsLess(Form.ZSTD, Form.GZIP))
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
