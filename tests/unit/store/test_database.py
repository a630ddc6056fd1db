"""The catalogue's file: upgrades and damage."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.errors import CatalogueUnusable
from obdelta.oci import Digest, Form
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.records import DeltaRow, Outcome, Totals
from tests.support.logs import logged
from tests.support.store import REACTOR, a_key, blobs, opened, publish

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
