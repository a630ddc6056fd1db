"""The catalogue's file: upgrades, damage, and several processes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred, gatherResults

from obdelta.errors import Cancelled, CatalogueUnusable
from obdelta.oci import Digest, Form
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.records import (
    DeltaRow,
    Outcome,
    Totals,
)
from tests.support.logs import logged
from tests.support.store import (
    REACTOR,
    a_key,
    a_row,
    blobs,
    opened,
    publish,
    some_layers,
)

__all__ = ["blobs"]

BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


_BEFORE_FORMS = """
    id, kind, recipe, base, target, base_repository, target_repository, tag, content, full_bytes,
    delta_bytes, seconds, created, last_served, served, details"""


async def published_before(
    blobs: BlobStore, directory: Path, steps: int, *created: int
) -> list[DeltaRow]:
    """Returns deltas that a version with this number of schema steps has published."""
    (directory / "new").mkdir()
    async with opened(directory / "new") as catalogue:
        rows = [
            await publish(catalogue, blobs, number, time) for number, time in enumerate(created)
        ]
    async with opened(directory, schema_steps()[:steps]):
        pass
    with closing(sqlite3.connect(directory / "catalogue.sqlite")) as connection, connection:
        connection.execute("ATTACH ? AS new", (str(directory / "new" / "catalogue.sqlite"),))
        for table, columns in (
            ("manifests", "digest, media_type, raw"),
            ("blobs", "digest, size"),
            ("manifest_blobs", "manifest, blob, media_type"),
            ("deltas", _BEFORE_FORMS),
            ("publications", "delta, target_repository, base_repository"),
        ):
            connection.execute(
                f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}"
            )
    return rows


@pytest_twisted.ensureDeferred
async def test_deltas_from_before_forms_are_gzip(blobs: BlobStore, tmp_path: Path) -> None:
    rows = await published_before(blobs, tmp_path, 14, 1000, 2000)
    async with opened(tmp_path) as catalogue:
        assert [row.key.form for row in rows] == [Form.GZIP] * 2
        assert await catalogue.recent(9) == rows[::-1]
        for row in rows:
            assert row.tag is not None
            assert await catalogue.delta_tagged("v2/target", row.tag) == row
            assert await catalogue.manifest("v2/target", row.content) is not None
            assert await catalogue.remove([row.key], blobs) > 0
        assert await catalogue.totals() == Totals(0, 0, 0)


@pytest_twisted.ensureDeferred
async def test_an_upgrade_retires_deltas_of_an_older_recipe(
    blobs: BlobStore, tmp_path: Path
) -> None:
    now, grace = 100_000, 600
    # as obdelta 0.1.0 left it
    await published_before(blobs, tmp_path, 7, now - grace - 1, now - grace)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection, connection:
        for kind, target in (("v3", TARGET), ("v2", TARGET), ("v3", BASE)):
            connection.execute(
                "INSERT INTO failures VALUES (?, ?, ?, 'not worth', 'too large', 1, ?, '', '')",
                (kind, BASE.hex, target.hex, now),
            )
    async with opened(tmp_path) as catalogue:
        engine = await catalogue.failures.remember(
            "v3", BASE, BASE, Outcome.TOO_LARGE, "x", now, 60, recipe=100_001
        )
        gone, _ = await catalogue.sweep(blobs, recipe=7, before=now - grace)
        assert gone == [a_key(0)]
        assert await catalogue.delta(a_key(1)) is not None
        assert await catalogue.failures.find("v3", BASE, TARGET, now, 60) is None
        assert await catalogue.failures.find("v3", BASE, BASE, now, 60) == engine
        assert await catalogue.failures.find("v2", BASE, TARGET, now, 60) is not None
        # A verdict of this recipe survives a restart, and ends with the next recipe.
        mine = await catalogue.failures.remember(
            "v3", BASE, TARGET, Outcome.TOO_LARGE, "x", now, 60, recipe=7
        )
        assert await catalogue.sweep(blobs, recipe=7, before=now - grace) == ([], 0)
        assert await catalogue.failures.find("v3", BASE, TARGET, now, 60) == mine
        gone, _ = await catalogue.sweep(blobs, recipe=8, before=now + 1)
        assert gone == [a_key(1)]
        assert await catalogue.failures.find("v3", BASE, TARGET, now, 60) is None
    assert list(blobs.digests()) == []


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
async def test_an_upgraded_schema_equals_a_new_one_and_keeps_its_rows(
    blobs: BlobStore, tmp_path: Path
) -> None:
    steps = [*schema_steps(), _NEXT]
    (tmp_path / "fresh").mkdir()
    with logged("info") as lines:
        for _ in range(2):
            async with opened(tmp_path / "fresh", steps):
                pass
    assert lines == []  # a new catalogue is no upgrade
    fresh = _schema(tmp_path / "fresh" / "catalogue.sqlite")
    assert fresh[2] == (len(steps),)
    for known in range(1, len(steps)):
        old = tmp_path / f"old{known}"
        old.mkdir()
        async with opened(old, steps[:known]) as catalogue:
            if known == len(steps) - 1:
                row = await publish(catalogue, blobs, 1, 1000)
        with logged("info") as lines:
            async with opened(old, steps) as catalogue:
                if known == len(steps) - 1:
                    assert await catalogue.delta(a_key(1)) == row
        (line,) = lines
        assert line.startswith(f"catalogue: upgraded from schema {known} to {len(steps)}: ")
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
async def test_a_damaged_or_foreign_file_is_refused_and_unchanged(
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
        with pytest.raises(CatalogueUnusable, match=why) as raised:
            await Catalogue.open(path, REACTOR)
        assert str(tmp_path) not in str(raised.value)
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
    """As after a disk wrote a page to the wrong place: every page is well-formed."""
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
    """Opens it like a server."""
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
                f"the v3 delta from {a_key(1).base} to {a_key(1).target} has missing or damaged"
                " files: it is built again on request"
            ]
            assert await catalogue.delta(a_key(1)) is None
        # Layers that this recipe can rebuild are only recorded as evicted.
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
        # A config cannot be rebuilt alone: all of the delta is built again.
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
async def test_later_damage_is_named(blobs: BlobStore, tmp_path: Path) -> None:
    await blobs.put(b"batch")
    async with opened(tmp_path) as catalogue:
        # More bytes than SQLite keeps in memory.
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
            # Reads, then writes: no process may have read a value that the other was about to
            # change.
            for catalogue in (one, two):
                failing = catalogue.failures.remember(
                    "v3", BASE, TARGET, Outcome.ERROR, "died", 100, 60
                )
                work.append(ensureDeferred(failing))
        await gatherResults(work)
        failure = await one.failures.find("v3", BASE, TARGET, 100, 60)
        assert failure is not None
        assert failure.count == 100
        assert (await one.counters())["n"] == 100
        found: DeltaRow | None = await one.delta(a_key(1))
        assert found is not None
        assert (found.served, found.last_served) == (5, 2040)


@pytest_twisted.ensureDeferred
async def test_a_closed_catalogue_is_a_clear_error(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    await catalogue.close()
    await catalogue.close()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.totals()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.add("n")
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.failures.forget("v3", BASE, TARGET)
