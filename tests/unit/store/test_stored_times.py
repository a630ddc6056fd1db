"""Times in the catalogue: every column with one is known, and times in the future are corrected."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import fleet_bytes, stored_times
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.evictions import Protection, oldest
from obdelta.store.catalogue.failure_records import MEMORY_SECONDS
from obdelta.store.catalogue.records import Outcome
from obdelta.store.catalogue.tables.device_pulls import LATEST, StartedPull
from obdelta.store.catalogue.tables.refreshed_rows import NamedDelta
from tests.support.store import REACTOR, a_key, publish, real_threads

HOUR, DAY = 3600, 86400
NOW = 1_800_000_000
NUMBERS = {
    ("blobs", "evicted"),
    ("blobs", "size"),
    ("counters", "value"),
    ("deltas", "delta_bytes"),
    ("deltas", "full_bytes"),
    ("deltas", "id"),
    ("deltas", "pinned"),
    ("deltas", "recipe"),
    ("deltas", "seconds"),
    ("deltas", "served"),
    ("device_downloads", "commands"),
    ("device_downloads", "seconds"),
    ("device_downloads", "size"),
    ("device_downloads", "target_size"),
    ("failures", "count"),
    ("failures", "recipe"),
    ("fleet_images", "application"),
    ("hours", "delta_bytes"),
    ("hours", "deltas"),
    ("hours", "full_bytes"),
    ("layers", "blob_size"),
    ("layers", "size"),
    ("publications", "delta"),
    ("queued_builds", "starts"),
    ("repository_failures", "count"),
    ("repository_failures", "recipe"),
}
"""Numbers in the catalogue that are no times. A new column must be here, or in stored_times."""


def in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    for step in schema_steps():
        connection.executescript(step)
    return connection


def test_every_time_of_the_schema_is_listed() -> None:
    connection = in_memory()
    found = connection.execute(
        "SELECT tables.name, columns.name FROM sqlite_master AS tables"
        " JOIN pragma_table_info(tables.name) AS columns"
        " WHERE tables.type = 'table' AND columns.type != 'TEXT' AND columns.type != 'BLOB'"
    ).fetchall()
    times = {*stored_times.TIMES, stored_times.HOURS, *stored_times.ENDS}
    assert set(found) == times | NUMBERS
    assert not times & NUMBERS


def test_downloads_of_future_hours_are_added_to_this_hour() -> None:
    connection = in_memory()
    hour = NOW // HOUR
    rows = [(hour, 1), (hour - 5, 2), (hour + 1, 4), (hour + 2, 8), (hour + 9000, 16)]
    connection.executemany(
        "INSERT INTO hours VALUES (?1, 'v3', ?2, ?2, ?2)", [(one, count) for one, count in rows]
    )
    assert stored_times.correct(connection, NOW) == 2
    found = connection.execute("SELECT * FROM hours ORDER BY hour").fetchall()
    assert found == [
        (one, "v3", count, count, count)
        for one, count in ((hour - 5, 2), (hour, 25), (hour + 1, 4))
    ]
    assert stored_times.correct(connection, NOW) == 0


def test_a_clock_that_is_not_set_corrects_nothing() -> None:
    connection = in_memory()
    connection.execute("INSERT INTO slow_work VALUES (?, 'reason', ?)", ("a" * 64, NOW))
    assert stored_times.correct(connection, 1000) == 0
    assert stored_times.correct(connection, NOW - HOUR) == 0
    assert stored_times.correct(connection, NOW - HOUR - 1) == 1


@pytest_twisted.ensureDeferred
async def test_a_clock_that_was_ahead_protects_no_delta_and_keeps_no_failure(
    tmp_path: Path,
) -> None:
    year = NOW + 365 * DAY
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    digest, work = Digest.of(b"image"), Digest.of(b"work")
    one = NamedDelta("v2/target", "delta-1", "v2/base", digest, digest)
    with real_threads() as threads:
        row = await publish(catalogue, BlobStore(tmp_path, threads), 1, year)
    await catalogue.counters.served(row.content, year)
    await catalogue.failures.remember("v3", digest, digest, Outcome.UNUSABLE, "no", year, DAY)
    await catalogue.slow_work.remember(work, "slow", year)
    await catalogue.named_deltas.record(one, year)

    async def state(now: int) -> tuple[bool, bool, bool, bool]:
        protection = Protection(now - DAY, now - DAY, -1, now + 60)
        read = catalogue._database.read
        return (
            await read(lambda connection: oldest(connection, protection)) is not None,
            bool(
                await read(
                    lambda connection: fleet_bytes.excess(connection, 0, now - DAY, now + 60)
                )
            ),
            await catalogue.failures.find("v3", digest, digest, now, DAY) is not None,
            await catalogue.slow_work.reason(work, now) is not None,
        )

    later = NOW + 2 * max(DAY, MEMORY_SECONDS)
    # The quota does not wait for the correction.
    assert await state(later) == (True, True, True, True)
    assert await catalogue.correct_times(NOW) == 6
    assert await state(NOW) == (False, False, True, True)
    assert await state(later) == (True, True, False, False)
    served = await catalogue.delta(a_key(1))
    assert served is not None
    assert (served.created, served.last_served) == (NOW, NOW)
    # The name is recorded again although it was recorded "later".
    await catalogue.named_deltas.record(one, NOW + 2 * HOUR)
    last = await catalogue._database.read(
        lambda connection: connection.execute("SELECT last FROM named_deltas").fetchone()
    )
    assert last == (NOW + 2 * HOUR,)
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_a_failed_write_does_not_fail_others(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    with real_threads() as threads:
        row = await publish(catalogue, BlobStore(tmp_path, threads), 1, NOW)

    def pull(name: str, until: int) -> StartedPull:
        return StartedPull(name, name, "v2/target", until)

    first = catalogue.counters.add("first", 1)  # its write is under way
    odd = [
        catalogue.counters.served(row.content, NOW, pull("\ud800", NOW)),
        catalogue.counters.served(row.content, 2**63, pull("time", NOW)),
        catalogue.counters.add("large", 2**63),
    ]
    honest = [
        catalogue.counters.served(row.content, NOW + 1, pull("honest", NOW + DAY)),
        catalogue.counters.served(row.content, NOW + 2, pull("far", 2**63)),
        catalogue.counters.add("counter", 3),
    ]
    await first
    for one in honest:
        await one
    for one in odd:
        with pytest.raises((OverflowError, UnicodeEncodeError)):
            await one
    served = await catalogue.delta(a_key(1))
    assert served is not None
    assert (served.served, served.last_served) == (2, NOW + 2)
    counters = await catalogue.counters.all()
    assert (counters["counter"], counters["first"]) == (3, 1)
    found = await catalogue._database.read(
        lambda connection: connection.execute(
            "SELECT token, until FROM started_pulls ORDER BY token"
        ).fetchall()
    )
    assert found == [("far", LATEST), ("honest", NOW + DAY)]
    await catalogue.close()
