"""What is deleted in time: failures of builds that neither answer for a pair nor are shown."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from obdelta import settings
from obdelta.app import expiry
from obdelta.app.state import Closers
from obdelta.delta.build import RECIPE
from obdelta.oci import Digest
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import Outcome
from tests.support.processes import until
from tests.support.server import running_server
from tests.support.web import reactor

DAY = 86400


async def fail(
    catalogue: Catalogue, name: str, days_ago: float, outcome: Outcome = Outcome.ERROR
) -> None:
    when = int(time.time() - days_ago * DAY)
    digest = Digest.of(name.encode())
    await catalogue.remember_failure("v3", digest, digest, outcome, name, when, DAY, recipe=RECIPE)


def kept(state: Path) -> list[str]:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
        rows = connection.execute(
            "SELECT reason, last FROM failures UNION ALL"
            " SELECT reason, last FROM repository_failures ORDER BY last"
        )
        return [row[0] for row in rows]


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.TOO_LARGE])
@pytest_twisted.ensureDeferred
async def test_old_failures_go_at_the_start_and_every_hour(
    tmp_path: Path, outcome: Outcome
) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    for name, days in (("old", 8), ("recent", 6)):
        await fail(catalogue, name, days, outcome)
    clock, closers = Clock(), Closers()
    given = {"upstream": "oci:/x", "public-url": "http://x", "failure-memory": "60"}
    expiry.expire_failures(settings.read(given, {}), clock, catalogue, closers)
    await catalogue.counters()  # the catalogue works in order
    assert kept(tmp_path) == ["recent"]
    await fail(catalogue, "older", 9, outcome)
    clock.advance(expiry.EVERY)
    await catalogue.counters()
    assert kept(tmp_path) == ["recent"]
    for close in closers:
        await close()
    assert not clock.getDelayedCalls()
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_the_server_does_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=f"oci:{tmp_path}"):
        pass
    catalogue = await Catalogue.open(state / "catalogue.sqlite", reactor)
    await fail(catalogue, "old", 8)
    await catalogue.close()
    with running_server(state, upstream=f"oci:{tmp_path}") as server:
        until("it is deleted", lambda: "1 old failures of builds were deleted" in server.log)
        assert kept(state) == []
