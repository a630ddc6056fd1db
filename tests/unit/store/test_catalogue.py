"""What the catalogue knows, publishes, forgets and refuses."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, gatherResults

from obdelta.errors import BlobUnknown, Cancelled, CatalogueUnusable, SizeMismatch
from obdelta.oci import Descriptor, DiffID, Digest
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import fleet_bytes, queries
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.evictions import Protection, oldest
from obdelta.store.catalogue.history import Served
from obdelta.store.catalogue.records import (
    DeltaRow,
    FailureRow,
    Kind,
    LayerRow,
    ManifestRow,
    Outcome,
    Totals,
)
from tests.support.logs import logged
from tests.support.store import (
    REACTOR,
    a_key,
    a_manifest,
    a_row,
    publish,
    real_threads,
    some_layers,
)

BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    with real_threads() as threads:
        yield BlobStore(tmp_path, threads)


@asynccontextmanager
async def opened(directory: Path, steps: list[str] | None = None) -> AsyncIterator[Catalogue]:
    catalogue = await Catalogue.open(directory / "catalogue.sqlite", REACTOR, steps=steps)
    try:
        yield catalogue
    finally:
        await catalogue.close()


# -- publishing --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_published_delta_is_found_by_all_its_names(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.delta(a_key(1)) is None
        row = await publish(catalogue, blobs, 1, 1000)
    config, layers = some_layers(1)
    manifest = a_manifest(config, layers)
    async with opened(tmp_path) as catalogue:
        assert await catalogue.delta(a_key(1)) == row
        assert (row.created, row.last_served, row.served, row.details) == (
            1000,
            1000,
            0,
            {"layers": [1, 2]},
        )
        assert row.tag is not None
        assert await catalogue.delta_tagged("v2/target", row.tag) == row
        assert await catalogue.tagged("v2/target", row.tag) == manifest.digest
        assert await catalogue.manifest("v2/target", manifest.digest) == ManifestRow(
            manifest.digest, DOCKER_MANIFEST, manifest.raw, frozenset({"v2/base"})
        )
        assert await catalogue.blob("v2/target", Digest.of(config)) == Descriptor(
            DOCKER_CONFIG, Digest.of(config), len(config)
        )
        assert await catalogue.blob("v2/target", Digest.of(layers[0])) == Descriptor(
            DOCKER_LAYER, Digest.of(layers[0]), len(layers[0])
        )
        # Nothing of it is seen in any other repository, not even in the base's.
        for repository in ("v2/base", "v2/other", ""):
            assert await catalogue.tagged(repository, row.tag) is None
            assert await catalogue.manifest(repository, manifest.digest) is None
            assert await catalogue.blob(repository, Digest.of(config)) is None
        assert await catalogue.tagged("v2/target", "delta-0") is None
        assert await catalogue.delta(replace(a_key(1), recipe=2)) is None
        assert await catalogue.totals() == Totals(1, 4, sum(map(len, layers)) + len(config))


@pytest_twisted.ensureDeferred
async def test_nothing_is_visible_unless_all_blobs_are_there(
    blobs: BlobStore, tmp_path: Path
) -> None:
    config, layers = some_layers(1)
    manifest = a_manifest(config, layers)
    row = a_row(a_key(1), manifest.digest, 1000)
    async with opened(tmp_path) as catalogue:
        for content in (config, *layers):
            with pytest.raises(BlobUnknown):
                await catalogue.publish_v3(row, manifest, blobs)
            assert await catalogue.totals() == Totals(0, 0, 0)
            assert await catalogue.manifest("v2/target", manifest.digest) is None
            await blobs.put(content)
        path = blobs.path(Digest.of(config))
        assert path is not None
        os.truncate(path, 3)
        with pytest.raises(SizeMismatch):
            await catalogue.publish_v3(row, manifest, blobs)
        await blobs.put(config)
        await catalogue.publish_v3(row, manifest, blobs)
        with pytest.raises(ValueError, match="not this manifest"):
            await catalogue.publish_v3(replace(row, content=BASE), manifest, blobs)
        with pytest.raises(ValueError, match="not of a batch"):
            await catalogue.publish_v2(row, blobs)


@pytest_twisted.ensureDeferred
async def test_the_same_pair_of_contents_in_other_repositories(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") is None
        row = await publish(catalogue, blobs, 1, 1000)
        assert row.tag is not None
        assert await catalogue.publish_for(a_key(1), "v2/base", "v2/target") == row
        assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") == row
        assert await catalogue.publish_for(a_key(1), "other/base", "fork/target") == row
        assert await catalogue.tagged("fork/target", row.tag) == row.content
        found = await catalogue.manifest("fork/target", row.content)
        assert found is not None
        assert found.base_repositories == {"fork/base", "other/base"}
        found = await catalogue.manifest("v2/target", row.content)
        assert found is not None
        assert found.base_repositories == {"v2/base"}


@pytest_twisted.ensureDeferred
async def test_publishing_a_key_again_keeps_the_first(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        config, layers = some_layers(2)
        for content in (config, *layers):
            await blobs.put(content)
        other = a_manifest(config, layers)
        again = replace(
            a_row(a_key(1), other.digest, 2000),
            base_repository="fork/base",
            target_repository="fork/target",
        )
        assert await catalogue.publish_v3(again, other, blobs) == row
        assert row.tag is not None
        assert await catalogue.tagged("fork/target", row.tag) == row.content
        assert await catalogue.manifest("fork/target", other.digest) is None
        # Another key of the same tag would mean two contents under one name.
        clash = replace(a_row(a_key(2), other.digest, 2000), tag=row.tag)
        with pytest.raises(sqlite3.IntegrityError):
            await catalogue.publish_v3(clash, other, blobs)
        assert (await catalogue.totals()).deltas == 1


@pytest_twisted.ensureDeferred
async def test_a_batch_is_published_as_a_blob(blobs: BlobStore, tmp_path: Path) -> None:
    key = a_key(1, "v2")
    row = a_row(key, Digest.of(b"batch"), 1000, 5)
    async with opened(tmp_path) as catalogue:
        with pytest.raises(BlobUnknown):
            await catalogue.publish_v2(row, blobs)
        await blobs.put(b"batch")
        with pytest.raises(SizeMismatch):
            await catalogue.publish_v2(replace(row, delta_bytes=6), blobs)
        assert await catalogue.publish_v2(row, blobs) == row
        assert await catalogue.publish_v2(row, blobs) == row
        assert await catalogue.delta(key) == row
        assert await catalogue.manifest("v2/target", row.content) is None
        assert await catalogue.blob("v2/target", row.content) is None
        assert await catalogue.sweep(blobs) == ([], 0)
        assert await catalogue.remove([key], blobs) == 5
        assert blobs.path(row.content) is None


def test_a_row_has_a_tag_where_it_needs_one() -> None:
    with pytest.raises(ValueError, match="has a tag"):
        replace(a_row(a_key(1, "v2"), BASE, 0), tag="delta-0")


# -- served, removed, swept --------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_herd_is_counted_whole_in_few_transactions(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        watcher = sqlite3.connect(tmp_path / "catalogue.sqlite")
        (frames,) = watcher.execute("PRAGMA data_version").fetchone()
        size = (tmp_path / "catalogue.sqlite-wal").stat().st_size
        await gatherResults(
            [
                ensureDeferred(catalogue.served(row.content, 2000 + index % 7))
                for index in range(2000)
            ]
            + [ensureDeferred(catalogue.add("full_pull.gone", 2)) for _ in range(500)]
        )
        assert watcher.execute("PRAGMA data_version").fetchone() != (frames,)
        watcher.close()
        # A transaction takes some pages of the log; 2,500 of them would take megabytes.
        assert (tmp_path / "catalogue.sqlite-wal").stat().st_size - size < 200_000
        after = await catalogue.delta(a_key(1))
        assert after == replace(row, served=2000, last_served=2006)
        served = {
            "served.v3.deltas": 2000,
            "served.v3.full_bytes": 2000 * row.full_bytes,
            "served.v3.delta_bytes": 2000 * row.delta_bytes,
        }
        assert await catalogue.counters() == {"full_pull.gone": 1000, **served}
        assert await catalogue.served_since(0, 1) == [
            Served(0, 2000, served["served.v3.full_bytes"], served["served.v3.delta_bytes"])
        ]
        await catalogue.served(row.content, 1500)
        assert await catalogue.delta(a_key(1)) == replace(row, served=2001, last_served=2006)
        await catalogue.served(BASE, 9999)
        wait = ensureDeferred(catalogue.add("cancelled"))
        wait.cancel()
        with pytest.raises(CancelledError):
            await wait
        last = ensureDeferred(catalogue.add("late"))
    await last
    async with opened(tmp_path) as catalogue:
        counters = await catalogue.counters()
        assert {"full_pull.gone": 1000, "cancelled": 1, "late": 1}.items() <= counters.items()
        assert counters["served.v3.deltas"] == 2001


@pytest_twisted.ensureDeferred
async def test_removing_keeps_what_others_need(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        rows = [await publish(catalogue, blobs, number, 1000 + number) for number in range(4)]
        await catalogue.served(rows[0].content, 5000)
        assert [row.key for row in await catalogue.removable(1003)] == [a_key(1), a_key(2)]
        assert [row.key for row in await catalogue.removable(9999)] == [
            a_key(1),
            a_key(2),
            a_key(3),
            a_key(0),
        ]
        assert [row.key for row in await catalogue.removable(9999, 1)] == [a_key(1)]
        assert [row.key for row in await catalogue.recent(2)] == [a_key(3), a_key(2)]
        config, layers = some_layers(1)
        shared = Digest.of(layers[-1])
        # What was served since stays, also when it was counted in the same breath.
        noted = [ensureDeferred(catalogue.served(rows[number].content, 6000)) for number in (3, 1)]
        assert await catalogue.remove([a_key(1)], blobs, unless=Protection(1003, 1003, 1)) == 0
        await gatherResults(noted)
        assert await catalogue.delta(a_key(1)) is not None
        freed = await catalogue.remove([a_key(1), a_key(77)], blobs)
        assert freed == len(config) + sum(map(len, layers[:-1]))
        assert await catalogue.delta(a_key(1)) is None
        assert await catalogue.manifest("v2/target", rows[1].content) is None
        assert await catalogue.blob("v2/target", Digest.of(config)) is None
        assert blobs.path(Digest.of(config)) is None
        assert blobs.path(shared) is not None
        assert await catalogue.manifest("v2/target", rows[2].content) is not None
        # A pinned blob (somebody is about to publish it again) outlives its delta, and can be
        # published.
        config, layers = some_layers(2)
        with blobs.pin(Digest.of(config)):
            await catalogue.remove([a_key(2)], blobs)
            assert blobs.path(Digest.of(config)) is not None
            assert blobs.path(Digest.of(layers[0])) is None
        await publish(catalogue, blobs, 2, 7000)
        await catalogue.remove([row.key for row in rows], blobs)
        assert await catalogue.totals() == Totals(0, 0, 0)
        assert not list(blobs.digests())


@pytest_twisted.ensureDeferred
async def test_two_recipes_may_share_one_manifest(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        config, layers = some_layers(1)
        newer = replace(a_row(a_key(1, recipe=2), row.content, 2000), delta_bytes=row.delta_bytes)
        assert newer.tag != row.tag
        await catalogue.publish_v3(newer, a_manifest(config, layers), blobs)
        assert await catalogue.remove([row.key], blobs) == 0
        assert await catalogue.manifest("v2/target", row.content) is not None
        assert await catalogue.blob("v2/target", Digest.of(config)) is not None
        assert await catalogue.remove([newer.key], blobs) > 0


@pytest_twisted.ensureDeferred
async def test_the_sweep_mends_what_a_disk_lost_and_what_a_kill_left(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        rows = [await publish(catalogue, blobs, number, 1000) for number in range(4)]
        await blobs.put(b"batch")
        batch = await catalogue.publish_v2(
            a_row(a_key(9, "v2"), Digest.of(b"batch"), 1000, 5), blobs
        )
        orphan, kept, pinned = [
            await blobs.put(content) for content in (b"orphan", b"kept", b"pinned")
        ]
        lost = blobs.path(Digest.of(some_layers(0)[0]))
        short = blobs.path(Digest.of(some_layers(1)[1][0]))
        gone = blobs.path(batch.content)
        assert lost is not None
        assert short is not None
        assert gone is not None
        lost.unlink()
        gone.unlink()
        os.truncate(short, 5)
        with blobs.pin(pinned):
            keys, files = await catalogue.sweep(blobs, frozenset({kept}))
        assert set(keys) == {a_key(0), a_key(1), a_key(9, "v2")}
        assert files == 1
        assert blobs.path(orphan) is None
        assert blobs.path(kept) is not None
        assert blobs.path(pinned) is not None
        for row in rows[2:]:
            assert await catalogue.manifest("v2/target", row.content) is not None
        assert await catalogue.sweep(blobs) == ([], 2)
        expected = {
            Digest.of(content) for number in (2, 3) for content in _all(some_layers(number))
        }
        assert set(blobs.digests()) == expected
        assert (await catalogue.totals()).blobs == len(expected)


def _all(parts: tuple[bytes, list[bytes]]) -> list[bytes]:
    return [parts[0], *parts[1]]


# -- failures, layers --------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_failures_are_counted_and_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.failure("v3", BASE, TARGET, 100, 60) is None
        first = await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.ERROR, "worker died", 100, 60
        )
        assert first == FailureRow("v3", BASE, TARGET, Outcome.ERROR, "worker died", 1, 100)
        second = await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.PROOF_FAILED, "bad", 159, 60
        )
        assert (second.count, second.outcome) == (2, Outcome.PROOF_FAILED)
        assert await catalogue.failure("v3", BASE, TARGET, 218, 60) == second
        assert await catalogue.failure("v3", BASE, TARGET, 219, 60) is None
        assert await catalogue.failure("v2", BASE, TARGET, 159, 60) is None
        assert await catalogue.failure("v3", TARGET, BASE, 159, 60) is None
        # It counts anew after it was forgotten.
        third = await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "large", 219, 60
        )
        assert third.count == 1
        other = await catalogue.remember_failure(
            "v2", BASE, TARGET, Outcome.ERROR, "rsync", 250, 60
        )
        assert await catalogue.failures(260, 60) == [other, third]
        assert await catalogue.failures(300, 60) == [other]
        assert (await catalogue.expire(300, 60))["failures"] == 1
        assert await catalogue.failures(300, 10_000) == [other]
        await catalogue.forget("v2", BASE, TARGET)
        await catalogue.forget("v2", BASE, TARGET)
        assert await catalogue.failures(300, 10_000) == []


@pytest_twisted.ensureDeferred
async def test_errors_belong_to_repositories_and_verdicts_to_contents(tmp_path: Path) -> None:
    ours, theirs = ("a/base", "a/target"), ("b/base", "b/target")
    async with opened(tmp_path) as catalogue:
        for _ in range(2):
            await catalogue.remember_failure(
                "v3", BASE, TARGET, Outcome.ERROR, "gone", 100, 50, repositories=ours
            )
        row = await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.ERROR, "away", 110, 50, repositories=theirs
        )
        assert row.count == 1
        found = await catalogue.failure("v3", BASE, TARGET, 120, 50, ours)
        assert found == FailureRow("v3", BASE, TARGET, Outcome.ERROR, "gone", 2, 100, *ours)
        assert await catalogue.failure("v3", BASE, TARGET, 120, 50, ("c/base", "c/target")) is None
        assert [row.reason for row in await catalogue.failures(120, 50)] == ["away", "gone"]
        await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "large", 120, 50, repositories=ours
        )
        for repositories in (ours, theirs, ("c/base", "c/target")):
            found = await catalogue.failure("v3", BASE, TARGET, 121, 50, repositories)
            assert found is not None and found.reason == "large"
        assert [row.reason for row in await catalogue.failures(120, 50)] == ["large", "away"]
        assert (await catalogue.expire(165, 50))["repository_failures"] == 1
        await catalogue.forget("v3", BASE, TARGET)
        assert await catalogue.failures(120, 50) == []


@pytest_twisted.ensureDeferred
async def test_an_upgrade_keeps_failures(tmp_path: Path) -> None:
    """As a catalogue of the schema before has them."""
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
            (row.outcome, row.count, row.recipe) for row in await catalogue.failures(120, 50)
        } == {(Outcome.TOO_LARGE, 3, 7), (Outcome.PROOF_FAILED, 3, 7), (Outcome.ERROR, 3, 7)}
        key: tuple[Kind, Digest, Digest] = ("v3", BASE, Digest.of(b"0"))
        assert await catalogue.failure(*key, 120, 50, ("a/base", "a/target")) is not None
        assert await catalogue.failure(*key, 120, 50, ("b/base", "b/target")) is None


@pytest_twisted.ensureDeferred
async def test_an_upgrade_retires_what_an_older_recipe_left(
    blobs: BlobStore, tmp_path: Path
) -> None:
    now, grace = 100_000, 600
    async with opened(tmp_path, schema_steps()[:7]) as catalogue:  # as obdelta 0.1.0 left it
        for number, created in enumerate([now - grace - 1, now - grace]):
            await publish(catalogue, blobs, number, created)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection, connection:
        for kind, target in (("v3", TARGET), ("v2", TARGET), ("v3", BASE)):
            connection.execute(
                "INSERT INTO failures VALUES (?, ?, ?, 'not worth', 'too large', 1, ?, '', '')",
                (kind, BASE.hex, target.hex, now),
            )
    async with opened(tmp_path) as catalogue:
        engine = await catalogue.remember_failure(
            "v3", BASE, BASE, Outcome.TOO_LARGE, "x", now, 60, recipe=100_001
        )
        gone, _ = await catalogue.sweep(blobs, recipe=7, before=now - grace)
        assert gone == [a_key(0)]
        assert await catalogue.delta(a_key(1)) is not None
        assert await catalogue.failure("v3", BASE, TARGET, now, 60) is None
        assert await catalogue.failure("v3", BASE, BASE, now, 60) == engine
        assert await catalogue.failure("v2", BASE, TARGET, now, 60) is not None
        # A verdict of this recipe outlives a restart, and ends with the next recipe.
        mine = await catalogue.remember_failure(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "x", now, 60, recipe=7
        )
        assert await catalogue.sweep(blobs, recipe=7, before=now - grace) == ([], 0)
        assert await catalogue.failure("v3", BASE, TARGET, now, 60) == mine
        gone, _ = await catalogue.sweep(blobs, recipe=8, before=now + 1)
        assert gone == [a_key(1)]
        assert await catalogue.failure("v3", BASE, TARGET, now, 60) is None
    assert list(blobs.digests()) == []


@pytest_twisted.ensureDeferred
async def test_a_layer_is_recorded_once_and_for_all(tmp_path: Path) -> None:
    row = LayerRow(BASE, 100, DiffID(TARGET.hex), 1000, DOCKER_LAYER)
    async with opened(tmp_path) as catalogue:
        assert await catalogue.layer(BASE) is None
        await catalogue.record_layer(row)
        await catalogue.record_layer(replace(row, diff_id=DiffID(BASE.hex)))
        assert await catalogue.layer(BASE) == row


# -- the file ----------------------------------------------------------------------------------


def _schema(
    path: Path,
) -> tuple[list[tuple[object, ...]], dict[str, list[tuple[object, ...]]], object]:
    with sqlite3.connect(path) as connection:
        objects = connection.execute(
            "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
        ).fetchall()
        tables = [name for kind, name, *_ in objects if kind == "table"]
        columns = {
            name: connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in tables
        }
        version = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return objects, columns, version


_NEXT = """
-- A step of a later version: a table, a column; with a ; in a comment.
CREATE TABLE later (name TEXT PRIMARY KEY NOT NULL) STRICT;
ALTER TABLE deltas ADD COLUMN later INTEGER NOT NULL DEFAULT 7;
"""


@pytest_twisted.ensureDeferred
async def test_upgraded_is_fresh_and_keeps_what_was_known(blobs: BlobStore, tmp_path: Path) -> None:
    steps = [*schema_steps(), _NEXT]
    (tmp_path / "fresh").mkdir()
    async with opened(tmp_path / "fresh", steps):
        pass
    fresh = _schema(tmp_path / "fresh" / "catalogue.sqlite")
    assert fresh[2] == (len(steps),)
    for known in range(1, len(steps)):
        old = tmp_path / f"old{known}"
        old.mkdir()
        async with opened(old, steps[:known]) as catalogue:
            if known == len(steps) - 1:
                row = await publish(catalogue, blobs, 1, 1000)
        async with opened(old, steps) as catalogue:
            if known == len(steps) - 1:
                assert await catalogue.delta(a_key(1)) == row
        assert _schema(old / "catalogue.sqlite") == fresh


@pytest_twisted.ensureDeferred
async def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    before = _schema(tmp_path / "catalogue.sqlite")
    with pytest.raises(sqlite3.OperationalError):
        await Catalogue.open(
            tmp_path / "catalogue.sqlite",
            REACTOR,
            steps=[*schema_steps(), _NEXT, "CREATE TABLE deltas (x);"],
        )
    with pytest.raises(CatalogueUnusable, match="cut short"):
        await Catalogue.open(
            tmp_path / "catalogue.sqlite", REACTOR, steps=[*schema_steps(), "CREATE TABLE y (x)"]
        )
    assert _schema(tmp_path / "catalogue.sqlite") == before


@pytest_twisted.ensureDeferred
async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    known = len(schema_steps())
    async with opened(tmp_path, [*schema_steps(), _NEXT]):
        pass
    before = (tmp_path / "catalogue.sqlite").read_bytes()
    with pytest.raises(
        CatalogueUnusable, match=f"newer obdelta .schema {known + 1}, this one knows {known}"
    ):
        await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    assert (tmp_path / "catalogue.sqlite").read_bytes() == before


@pytest_twisted.ensureDeferred
async def test_what_is_damaged_or_foreign_is_refused_and_left_alone(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        for number in range(20):
            await publish(catalogue, blobs, number, 1000)
    path = tmp_path / "catalogue.sqlite"
    good = path.read_bytes()
    assert len(good) > 20 * 4096
    damaged = bytearray(good)
    for page in range(2, len(good) // 4096):
        damaged[page * 4096 : page * 4096 + 2048] = b"\xa5" * 2048
    for content, why in (
        (b"not a database at all, but long enough to look at" * 100, "damaged"),
        (bytes(damaged), "damaged"),
        (good[: len(good) // 2], "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CatalogueUnusable, match=why) as caught:
            await Catalogue.open(path, REACTOR)
        assert str(tmp_path) not in str(caught.value)
        assert path.read_bytes() == content
    path.unlink()
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE theirs (x)")
    foreign.commit()
    foreign.close()
    with pytest.raises(CatalogueUnusable, match="not made by obdelta"):
        await Catalogue.open(path, REACTOR)
    path.write_bytes(good)
    async with opened(tmp_path) as catalogue:
        assert (await catalogue.totals()).deltas == 20


@pytest_twisted.ensureDeferred
async def test_a_page_that_is_a_copy_of_its_neighbour_is_found_at_the_start(
    blobs: BlobStore, tmp_path: Path
) -> None:
    """As a disk leaves it that wrote a page to the wrong place: every page is well formed."""
    path = tmp_path / "catalogue.sqlite"
    async with opened(tmp_path) as catalogue:
        for number in range(60):
            await publish(catalogue, blobs, number, 1000 + number)
    whole = path.read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    pages = [whole[at : at + size] for at in range(0, len(whole), size)]
    alike = [
        n
        for n in range(1, len(pages))
        if pages[n][0] == pages[n - 1][0] and pages[n] != pages[n - 1]
    ]
    leaves = [n for n in alike if pages[n][0] in (0x0A, 0x0D)]
    assert len(leaves) > 20
    missed_before = 0
    for number in leaves:
        path.write_bytes(b"".join([*pages[:number], pages[number - 1], *pages[number + 1 :]]))
        with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.DatabaseError):
            missed_before += connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        with pytest.raises(CatalogueUnusable, match="damaged"):
            async with opened(tmp_path):
                pass
    assert missed_before
    path.write_bytes(whole)
    async with opened(tmp_path) as catalogue:
        assert (await catalogue.totals()).deltas == 60


@asynccontextmanager
async def guarded(directory: Path, blobs: BlobStore) -> AsyncIterator[Catalogue]:
    """As a server opens it."""
    catalogue = await Catalogue.open(directory / "catalogue.sqlite", REACTOR, blobs=blobs, recipe=1)
    try:
        yield catalogue
    finally:
        await catalogue.close()


def change(directory: Path, script: str) -> None:
    with closing(sqlite3.connect(directory / "catalogue.sqlite")) as connection:
        connection.executescript(script)


@pytest.mark.parametrize("how", ["removed", "cut short"])
@pytest_twisted.ensureDeferred
async def test_a_delta_is_found_only_if_its_files_are_there(
    blobs: BlobStore, tmp_path: Path, how: str
) -> None:
    def spoil(content: bytes) -> None:
        path = blobs.path(Digest.of(content))
        assert path is not None
        if how == "removed":
            path.unlink()
        else:
            os.truncate(path, 1)

    async with guarded(tmp_path, blobs) as catalogue:
        config, layers = some_layers(1)
        for part in (config, *layers):
            await publish(catalogue, blobs, 1, 1000)
            assert await catalogue.delta(a_key(1)) is not None
            spoil(part)
            with logged("warn") as lines:
                assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") is None
            assert lines == [
                f"the v3 delta from {a_key(1).base} to {a_key(1).target} is not whole on the disk:"
                " it is built anew"
            ]
            assert await catalogue.delta(a_key(1)) is None
        # What this recipe can make again is only noted as evicted.
        row = await publish(catalogue, blobs, 1, 1000)
        change(
            tmp_path,
            """UPDATE deltas SET details = '{"effort": "fast", "common": 0}' WHERE kind = 'v3'""",
        )
        spoil(layers[0])
        found = await catalogue.delta(a_key(1))
        assert found is not None and found.content == row.content
        assert await catalogue.evictions.is_evicted(Digest.of(layers[0]))
        spoil(layers[1])
        assert await catalogue.lost(Digest.of(layers[1]))
        assert {
            one.effort
            for one in await catalogue.evictions.of_blob("v2/target", Digest.of(layers[1]))
        } == {"fast"}
        # A config is not: all of it is built anew.
        spoil(config)
        assert not await catalogue.lost(Digest.of(config))
        assert await catalogue.delta(a_key(1)) is None
        await blobs.put(b"batch")
        await catalogue.publish_v2(a_row(a_key(2, "v2"), Digest.of(b"batch"), 1000, 5), blobs)
        assert await catalogue.delta(a_key(2, "v2")) is not None
        spoil(b"batch")
        assert await catalogue.delta(a_key(2, "v2")) is None


@pytest.mark.parametrize(
    "damage",
    [
        "PRAGMA foreign_keys = OFF; DELETE FROM manifests",
        "UPDATE manifests SET raw = x'7b7d'",
        "UPDATE blobs SET size = size + 1",
        "PRAGMA foreign_keys = OFF; DELETE FROM manifest_blobs",
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_delta_that_the_catalogue_has_in_part_is_not_found(
    blobs: BlobStore, tmp_path: Path, damage: str
) -> None:
    async with guarded(tmp_path, blobs) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        change(tmp_path, damage)
        assert await catalogue.delta(a_key(1)) is None
        assert await catalogue.manifest("v2/target", row.content) is None


@pytest_twisted.ensureDeferred
async def test_damage_that_shows_later_is_named(blobs: BlobStore, tmp_path: Path) -> None:
    await blobs.put(b"batch")
    async with opened(tmp_path) as catalogue:
        # More than SQLite keeps in memory.
        for number in range(12):
            row = a_row(a_key(number, "v2"), Digest.of(b"batch"), 1000, 5)
            await catalogue.publish_v2(replace(row, details={"members": "x" * 500_000}), blobs)
    path = tmp_path / "catalogue.sqlite"
    async with opened(tmp_path) as catalogue:
        with path.open("r+b") as file:
            for page in range(1, path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xa5" * 4096)
        with pytest.raises(CatalogueUnusable, match="damaged"):
            await catalogue.recent(100)


@pytest_twisted.ensureDeferred
async def test_two_processes_may_share_the_file(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as two:
        row = await publish(one, blobs, 1, 1000)
        assert await two.delta(a_key(1)) == row
        work: list[Deferred[Any]] = []
        for index in range(50):
            work += [ensureDeferred(one.add("n")), ensureDeferred(two.add("n"))]
            if index % 10 == 0:
                work.append(ensureDeferred(two.served(row.content, 2000 + index)))
            # Reads, then writes: neither may have read what the other was about to change.
            for catalogue in (one, two):
                failing = catalogue.remember_failure(
                    "v3", BASE, TARGET, Outcome.ERROR, "died", 100, 60
                )
                work.append(ensureDeferred(failing))
        await gatherResults(work)
        failure = await one.failure("v3", BASE, TARGET, 100, 60)
        assert failure is not None
        assert failure.count == 100
        assert (await one.counters())["n"] == 100
        found: DeltaRow | None = await one.delta(a_key(1))
        assert found is not None
        assert (found.served, found.last_served) == (5, 2040)


@pytest_twisted.ensureDeferred
async def test_a_closed_catalogue_says_so(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    await catalogue.close()
    await catalogue.close()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.totals()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.add("n")
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.forget("v3", BASE, TARGET)


def steps_of_eviction(directory: Path, count: int) -> int:
    """Counts SQLite's steps, in hundreds, for what an eviction looks for among so many deltas, half
    of them evicted.
    """
    path = directory / f"{count}.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for step in schema_steps():
            connection.executescript(step)
        connection.execute("BEGIN")
        for number in range(count):
            config, layers = some_layers(number)
            manifest = a_manifest(config, layers)
            queries.insert_manifest(connection, manifest)
            row = replace(
                a_row(a_key(number), manifest.digest, number),
                details={"effort": "fast", "common": 0},
                served=1,
                base_repository=f"v2/{number}",
                target_repository=f"v2/{number + 1}",
            )
            queries.insert_delta(connection, row)
            queries.insert_publication(
                connection, row.key, row.base_repository, row.target_repository
            )
            if number < count // 2:
                parts = [(part.digest.hex,) for part in manifest.layers[:-1]]
                connection.executemany("UPDATE blobs SET evicted = 1 WHERE digest = ?", parts)
        connection.execute("COMMIT")
        steps = 0

        def stepped() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(stepped, 100)
        assert len(fleet_bytes.excess(connection, 1, count + 1)) == count - count // 2
        assert oldest(connection, Protection(count + 1, count + 1, 1)) is not None
        return steps


def test_the_work_of_an_eviction_grows_no_faster_than_the_deltas(tmp_path: Path) -> None:
    assert steps_of_eviction(tmp_path, 400) < 3 * steps_of_eviction(tmp_path, 200)
