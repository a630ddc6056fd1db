"""Failures and verdicts in the catalogue: to what they belong, and which an upgrade keeps."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest_twisted

from obdelta.oci import Digest, Form
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.records import (
    FailureRow,
    Kind,
    Outcome,
)
from tests.support.store import opened

BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


@pytest_twisted.ensureDeferred
async def test_failures_are_counted_and_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.failures.find("v3", BASE, TARGET, 100, 60) is None
        first = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.ERROR, "worker died", 100, 60
        )
        assert first == FailureRow("v3", BASE, TARGET, Outcome.ERROR, "worker died", 1, 100)
        second = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.PROOF_FAILED, "bad", 159, 60
        )
        assert (second.count, second.outcome) == (2, Outcome.PROOF_FAILED)
        assert await catalogue.failures.find("v3", BASE, TARGET, 218, 60) == second
        assert await catalogue.failures.find("v3", BASE, TARGET, 219, 60) is None
        assert await catalogue.failures.find("v2", BASE, TARGET, 159, 60) is None
        assert await catalogue.failures.find("v3", TARGET, BASE, 159, 60) is None
        # The count starts at one again after it was forgotten.
        third = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "large", 219, 60
        )
        assert third.count == 1
        other = await catalogue.failures.remember(
            "v2", BASE, TARGET, Outcome.ERROR, "rsync", 250, 60
        )
        assert await catalogue.failures.all(260, 60) == [other, third]
        assert await catalogue.failures.all(300, 60) == [other]
        assert (await catalogue.expire(300, 60))["failures"] == 1
        assert await catalogue.failures.all(300, 10_000) == [other]
        await catalogue.failures.forget("v2", BASE, TARGET)
        await catalogue.failures.forget("v2", BASE, TARGET)
        assert await catalogue.failures.all(300, 10_000) == []


@pytest_twisted.ensureDeferred
async def test_errors_belong_to_repositories_and_verdicts_to_contents(tmp_path: Path) -> None:
    first_pair, second_pair = ("a/base", "a/target"), ("b/base", "b/target")
    async with opened(tmp_path) as catalogue:
        for _ in range(2):
            await catalogue.failures.remember(
                "v3", BASE, TARGET, Outcome.ERROR, "gone", 100, 50, repositories=first_pair
            )
        row = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.ERROR, "away", 110, 50, repositories=second_pair
        )
        assert row.count == 1
        found = await catalogue.failures.find("v3", BASE, TARGET, 120, 50, first_pair)
        assert found == FailureRow("v3", BASE, TARGET, Outcome.ERROR, "gone", 2, 100, *first_pair)
        assert (
            await catalogue.failures.find("v3", BASE, TARGET, 120, 50, ("c/base", "c/target"))
            is None
        )
        assert [row.reason for row in await catalogue.failures.all(120, 50)] == ["away", "gone"]
        await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "large", 120, 50, repositories=first_pair
        )
        for repositories in (first_pair, second_pair, ("c/base", "c/target")):
            found = await catalogue.failures.find("v3", BASE, TARGET, 121, 50, repositories)
            assert found is not None and found.reason == "large"
        assert [row.reason for row in await catalogue.failures.all(120, 50)] == ["large", "away"]
        assert (await catalogue.expire(165, 50))["repository_failures"] == 1
        await catalogue.failures.forget("v3", BASE, TARGET)
        assert await catalogue.failures.all(120, 50) == []


@pytest_twisted.ensureDeferred
async def test_verdicts_of_one_form_and_of_every_form(tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        for form, reason in ((Form.ZSTD, "zstd"), (Form.ZSTD, "zstd again"), (Form.GZIP, "gzip")):
            await catalogue.failures.remember(
                "v3", BASE, TARGET, Outcome.TOO_LARGE, reason, 100, 60, form=form
            )
        for form, reason, count in ((Form.ZSTD, "zstd again", 2), (Form.GZIP, "gzip", 1)):
            found = await catalogue.failures.find("v3", BASE, TARGET, 110, 60, form=form)
            assert found == FailureRow(
                "v3", BASE, TARGET, Outcome.TOO_LARGE, reason, count, 100, form=form
            )
        assert await catalogue.failures.find("v3", BASE, TARGET, 110, 60) is None
        await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.PROOF_FAILED, "both", 120, 60, times=1
        )
        for form in (*Form, None):
            found = await catalogue.failures.find("v3", BASE, TARGET, 130, 60, form=form)
            assert found is not None and (found.reason, found.form) == ("both", None)
        assert len(await catalogue.failures.all(130, 60)) == 3
        # Errors do not depend on the form.
        await catalogue.failures.remember(
            "v3", BASE, BASE, Outcome.ERROR, "died", 120, 60, form=Form.ZSTD
        )
        found = await catalogue.failures.find("v3", BASE, BASE, 130, 60, form=Form.GZIP)
        assert found is not None and found.form is None
        await catalogue.failures.forget("v3", BASE, TARGET)
        assert [row.reason for row in await catalogue.failures.all(130, 60)] == ["died"]


@pytest_twisted.ensureDeferred
async def test_an_upgrade_lets_old_verdicts_count_for_every_form(tmp_path: Path) -> None:
    """It also resumes queued builds as the version before would have: in the best form."""
    number = next(n for n, step in enumerate(schema_steps()) if "TABLE failures_by_form" in step)
    async with opened(tmp_path, schema_steps()[:number]):
        pass
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection, connection:
        connection.execute(
            "INSERT INTO failures VALUES ('v3', ?, ?, 'not worth', 'why', 3, 100, 'a', 'b', 7)",
            (BASE.hex, TARGET.hex),
        )
        for kind, since in (("v3", 2), ("v2", 1)):
            connection.execute(
                "INSERT INTO queued_builds VALUES (?, 'a', ?, 'b', ?, ?, 1)",
                (kind, BASE.hex, TARGET.hex, since),
            )
    async with opened(tmp_path) as catalogue:
        for form in Form:
            found = await catalogue.failures.find("v3", BASE, TARGET, 110, 60, form=form)
            assert found is not None and (found.reason, found.count) == ("why", 3)
        builds, dropped = await catalogue.pending_builds.take_all(2)
        assert dropped == 0
        assert [(build.kind, build.form, build.since) for build in builds] == [
            ("v2", Form.GZIP, 1),
            ("v3", Form.ZSTD, 2),
        ]
        # The second start was counted.
        assert (await catalogue.pending_builds.take_all(2))[1] == 2


@pytest_twisted.ensureDeferred
async def test_an_upgrade_keeps_failures(tmp_path: Path) -> None:
    """Makes the rows as a catalogue with the earlier schema has them."""
    number = next(
        number for number, step in enumerate(schema_steps()) if "TABLE repository_failures" in step
    )
    async with opened(tmp_path, schema_steps()[:number]):
        pass
    values = [("v3", BASE.hex, Digest.of(b"%d" % n).hex) for n in range(3)]
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection, connection:
        for pair, outcome in zip(values, ("error", "not worth", "proof failed"), strict=True):
            connection.execute(
                "INSERT INTO failures (kind, base, target, outcome, reason, count, last,"
                " base_repository, target_repository, recipe) VALUES (?, ?, ?, ?, 'why', 3, 100,"
                " 'a/base', 'a/target', 7)",
                (*pair, outcome),
            )
    async with opened(tmp_path) as catalogue:
        assert {
            (row.outcome, row.count, row.recipe) for row in await catalogue.failures.all(120, 50)
        } == {(Outcome.TOO_LARGE, 3, 7), (Outcome.PROOF_FAILED, 3, 7), (Outcome.ERROR, 3, 7)}
        key: tuple[Kind, Digest, Digest] = ("v3", BASE, Digest.of(b"0"))
        assert await catalogue.failures.find(*key, 120, 50, ("a/base", "a/target")) is not None
        assert await catalogue.failures.find(*key, 120, 50, ("b/base", "b/target")) is None


@pytest_twisted.ensureDeferred
async def test_a_failure_is_forgotten_with_its_own_slow_work(tmp_path: Path) -> None:
    """Other work that ended for the same reason stays remembered."""
    works = [Digest.of(b"%d" % n) for n in range(3)]
    async with opened(tmp_path) as catalogue:
        for work in works:
            await catalogue.slow_work.remember(work, "too slow", 100)
        await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.ERROR, "too slow", 100, 60, work=works[0]
        )
        again = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.ERROR, "upstream registry: it is gone", 101, 60
        )
        assert again.work == works[0]  # a later failure of another kind does not hide it
        assert await catalogue.failures.all(102, 60) == [again]
        await catalogue.failures.forget_with_work("v3", BASE, TARGET)
        assert await catalogue.failures.all(102, 60) == []
        assert [await catalogue.slow_work.reason(work, 102) for work in works] == [
            None,
            "too slow",
            "too slow",
        ]
        await catalogue.slow_work.forget(works[1])
        assert await catalogue.slow_work.reason(works[1], 102) is None
        assert await catalogue.slow_work.reason(works[2], 102) == "too slow"


@pytest_twisted.ensureDeferred
async def test_slow_work_of_an_earlier_version_is_forgotten_by_its_reason(tmp_path: Path) -> None:
    number = next(n for n, step in enumerate(schema_steps()) if "ADD COLUMN work" in step)
    async with opened(tmp_path, schema_steps()[:number]):
        pass
    slow, other = Digest.of(b"slow"), Digest.of(b"other")
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection, connection:
        connection.execute(
            "INSERT INTO repository_failures (kind, base, target, reason, count, last,"
            " base_repository, target_repository, recipe) VALUES ('v3', ?, ?,"
            " 'layer 2: more than 9 seconds', 3, 100, 'a/base', 'a/target', 7)",
            (BASE.hex, TARGET.hex),
        )
        for key, reason in ((slow, "more than 9 seconds"), (other, "more than 8 seconds")):
            connection.execute("INSERT INTO slow_work VALUES (?, ?, 100)", (key.hex, reason))
    async with opened(tmp_path) as catalogue:
        (row,) = await catalogue.failures.all(110, 60)
        assert (row.reason, row.work) == ("layer 2: more than 9 seconds", None)
        await catalogue.failures.forget_with_work("v3", BASE, TARGET)
        assert await catalogue.slow_work.reason(slow, 110) is None
        assert await catalogue.slow_work.reason(other, 110) == "more than 8 seconds"
