"""Hourly care of the catalogue: what is deleted in time, and what a wrong clock must not delete."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from obdelta.builds.delta_actions import FAILURE_SECONDS
from obdelta.delta.build import RECIPE
from obdelta.oci import Digest
from obdelta.store import expiry
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import Outcome
from obdelta.store.catalogue.stored_times import SHARE
from obdelta.store.catalogue.tables.refreshed_rows import KEPT_SECONDS, NamedDelta
from tests.support.logs import logged
from tests.support.processes import until
from tests.support.server import running_server
from tests.support.web import reactor

DAY = 86400
ROWS = 3 * SHARE


async def fail(
    catalogue: Catalogue, name: str, when: float, outcome: Outcome = Outcome.ERROR
) -> None:
    digest = Digest.of(name.encode())
    await catalogue.failures.remember(
        "v3", digest, digest, outcome, name, int(when), DAY, recipe=RECIPE
    )


def kept(state: Path) -> list[str]:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
        rows = connection.execute(
            "SELECT reason, last FROM failures UNION ALL"
            " SELECT reason, last FROM repository_failures ORDER BY last"
        )
        return [row[0] for row in rows]


def named(state: Path) -> int:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM named_deltas").fetchone()[0])


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.TOO_LARGE])
@pytest_twisted.ensureDeferred
async def test_old_failures_are_deleted_hourly_by_a_steady_clock(
    tmp_path: Path, outcome: Outcome
) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    began = time.time()
    for name, days in (("old", 8), ("recent", 6)):
        await fail(catalogue, name, began - days * DAY, outcome)
    clock = Clock()
    service = expiry.make_expiry(clock, catalogue, FAILURE_SECONDS, lambda: began + clock.seconds())
    service.startService()
    await catalogue.counters.all()  # the catalogue works in order of its calls
    assert kept(tmp_path) == ["old", "recent"]
    clock.advance(expiry.EVERY)
    await catalogue.counters.all()
    await catalogue.counters.all()
    assert kept(tmp_path) == ["recent"]
    await service.stopService()
    assert not clock.getDelayedCalls()
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_a_clock_jump_deletes_nothing_and_a_wrong_clock_little(
    tmp_path: Path,
) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    began, ahead, steady = time.time(), 2.0 * KEPT_SECONDS, 0.0
    digest = Digest.of(b"image")
    for number in range(ROWS):
        one = NamedDelta("v2/target", f"delta-{number}", "v2/base", digest, digest)
        await catalogue.named_deltas.record(one, began)
    wall = began
    care = expiry.Expiry(catalogue, DAY, lambda: wall, lambda: steady)
    await care.run()
    # The clock jumps, and a client gets the name of a delta.
    wall, steady = began + ahead, expiry.EVERY
    await catalogue.named_deltas.record(
        NamedDelta("v2/x", "delta-x", "v2/base", digest, digest), wall
    )
    with logged("warn") as lines:
        await care.run()
    assert "the system's clock jumped by" in str(lines)
    assert named(tmp_path) == ROWS + 1
    # It stays wrong.
    wall, steady = wall + expiry.EVERY, 2 * expiry.EVERY
    await care.run()
    assert named(tmp_path) == ROWS + 1 - 1 - (ROWS + 1) // SHARE
    # It is right again: stored times are no longer in the future, and are written again.
    left, wall, steady = named(tmp_path), began + 3 * expiry.EVERY, 3 * expiry.EVERY
    with logged("warn") as lines:
        await care.run()
    assert "1 times in the catalogue were in the future" in str(lines)
    assert named(tmp_path) == left
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        latest = "SELECT max(last) FROM named_deltas"
        assert connection.execute(latest).fetchone() == (int(wall),)
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_the_server_corrects_times_when_it_starts(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=f"oci:{tmp_path}"):
        pass
    catalogue = await Catalogue.open(state / "catalogue.sqlite", reactor)
    await fail(catalogue, "ahead", time.time() + 365 * DAY)
    await catalogue.close()
    with running_server(state, upstream=f"oci:{tmp_path}") as server:
        until("it is corrected", lambda: "in the catalogue were in the future" in server.log)
        with closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
            latest = "SELECT max(last) FROM repository_failures"
            assert connection.execute(latest).fetchone()[0] <= time.time()
