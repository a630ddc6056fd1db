"""Names of images in the catalogue: found by digest, bounded, and gone after their time."""

from __future__ import annotations

from pathlib import Path

import pytest_twisted

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.refreshed_rows import NAMES_REFRESH_SECONDS, NamedImages
from tests.support.store import REACTOR

NOW = 1_800_000_000.0


def digest(number: int) -> Digest:
    return Digest.of(str(number).encode())


@pytest_twisted.ensureDeferred
async def test_the_last_recorded_names_are_found_by_digest(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    names = NamedImages(database)
    await names.record(digest(1), ImageNames("acme", "web", "1", "a"), NOW)
    await names.record(digest(1), ImageNames("acme", "web", "2", "b"), NOW)
    await names.record(digest(2), ImageNames(), NOW)
    found = await names.of([digest(1), digest(2), digest(3), digest(1)])
    assert found == {digest(1): ImageNames("acme", "web", "2", "b")}
    assert await names.of([]) == {}
    await database.close()


@pytest_twisted.ensureDeferred
async def test_the_table_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    names = NamedImages(database, most=5)
    for number in range(12):
        await names.record(digest(number), ImageNames(release=str(number)), NOW + number)
    found = await names.of([digest(number) for number in range(12)])
    assert sorted(int(each.release) for each in found.values()) == [7, 8, 9, 10, 11]
    await database.close()


@pytest_twisted.ensureDeferred
async def test_the_same_names_are_written_once_a_day(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    names = NamedImages(database)

    async def last() -> int:
        return await database.read(
            lambda connection: int(connection.execute("SELECT last FROM image_names").fetchone()[0])
        )

    for later, written in ((0, 0), (60, 0), (NAMES_REFRESH_SECONDS, NAMES_REFRESH_SECONDS)):
        await names.record(digest(1), ImageNames("acme"), NOW + later)
        assert await last() == NOW + written
    await database.close()
