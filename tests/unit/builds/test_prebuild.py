"""Lists of wanted deltas, and the images that devices asked from.

The coordinator is the tests' own: it answers when and as they say. Lists before the real one are in
test_server_prepare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from obdelta.builds.prebuild import (
    KEPT,
    KEPT_JOBS,
    MOST_JOBS,
    MOST_OPEN,
    QUEUE_PAUSE,
    Job,
    Preparation,
    Preparing,
)
from obdelta.builds.queue import Priority
from obdelta.builds.service import Answer, FullPull
from obdelta.errors import QueueFull, StillBuilding, TooManyRequests
from obdelta.oci import Digest, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import Kind
from obdelta.store.catalogue.requested_updates import KEPT_SECONDS, REFRESH_SECONDS, UpdateHistory
from tests.support.store import REACTOR

BASE, TARGET, OTHER = (Reference("", f"v2/{name}") for name in ("base", "target", "other"))
NOBODY = Credentials.anonymous()


class Deltas:
    """Answers are given by the test, in whatever order."""

    def __init__(self) -> None:
        self.watchers: list[Any] = []
        self.asked: list[tuple[str, str]] = []
        self.answers: list[Deferred[Answer]] = []

    async def delta(
        self,
        kind: Kind,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        wait: float,
        client: str = "",
        *,
        priority: Priority = Priority.DEVICE,
    ) -> Answer:
        assert priority is Priority.PREPARED, "devices go first"
        self.asked.append((base.repository, target.repository))
        answer: Deferred[Answer] = Deferred()
        self.answers.append(answer)
        return await answer


def begun(at_once: int = 2) -> tuple[Deltas, Clock, Preparing]:
    deltas, clock = Deltas(), Clock()
    return deltas, clock, Preparing(deltas, clock, at_once, "delta.example.com")


def states(preparation: Preparation) -> list[str]:
    return [job.state for job in preparation.jobs]


def test_so_many_at_once_and_each_pair_once() -> None:
    deltas, _, preparing = begun(at_once=1)
    preparation = preparing.begin([(BASE, TARGET), (BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    assert states(preparation) == ["building", "waiting"] and deltas.asked == [
        ("v2/base", "v2/target")
    ]
    told: list[Job | None] = []
    preparation.listeners.append(told.append)
    deltas.answers[0].callback(FullPull("not worth it"))
    assert states(preparation) == ["full-pull", "building"]
    deltas.answers[1].callback(FullPull("nor this"))
    assert states(preparation) == ["full-pull", "full-pull"]
    assert told == [preparation.jobs[1], preparation.jobs[0], preparation.jobs[1], None]
    assert preparing.find(preparation.id) is preparation
    assert preparing.find(preparation.jobs[1].id) is preparation.jobs[1]


def test_a_full_queue_is_tried_again_later() -> None:
    deltas, clock, preparing = begun()
    preparation = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    for attempt in range(1, 4):
        deltas.answers[-1].errback(QueueFull(7))
        assert states(preparation) == ["building"] and len(deltas.asked) == attempt
        clock.advance(QUEUE_PAUSE)
        assert len(deltas.asked) == attempt + 1
    deltas.answers[-1].errback(StillBuilding())
    assert states(preparation) == ["failed"] and preparation.done and not clock.getDelayedCalls()


def test_what_nobody_foresaw_fails_its_job_only() -> None:
    deltas, _, preparing = begun()
    preparation = preparing.begin([(BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    deltas.answers[0].errback(ZeroDivisionError("secret"))
    deltas.answers[1].callback(FullPull("no"))
    assert states(preparation) == ["failed", "full-pull"]
    assert "secret" not in str(preparation.as_json())


def test_lists_are_bounded_and_finished_ones_forgotten() -> None:
    deltas, _, preparing = begun(at_once=1000)
    first = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    for _ in range(MOST_OPEN - 1):
        preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    with pytest.raises(TooManyRequests):
        preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    deltas.answers[0].callback(FullPull("no"))
    for _ in range(KEPT):
        assert preparing.find(first.id) is first
        preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
        deltas.answers[-1].callback(FullPull("no"))
    preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    assert preparing.find(first.id) is None


def test_of_long_lists_fewer_are_remembered() -> None:
    deltas, _, preparing = begun(at_once=1000)
    lists = []
    for _ in range(6):
        lists.append(
            preparing.begin(
                [(Reference("", f"v2/{n}"), TARGET) for n in range(MOST_JOBS)], ["v3"], NOBODY
            )
        )
        for answer in deltas.answers[-MOST_JOBS:]:
            answer.callback(FullPull("no"))
    last = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    remembered = [one for one in lists if preparing.find(one.id) is one]
    assert remembered == lists[-(KEPT_JOBS // MOST_JOBS) :] and preparing.find(last.id) is last


@pytest.mark.parametrize("full", [False, True])
@pytest_twisted.ensureDeferred
async def test_the_end_of_the_server_ends_lists(full: bool) -> None:
    deltas, clock, preparing = begun(at_once=1)
    preparation = preparing.begin([(BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    if full:
        deltas.answers[0].errback(QueueFull(7))
    await preparing.close()
    assert preparation.done and states(preparation) == ["failed", "failed"]
    assert deltas.asked == [("v2/base", "v2/target")]
    assert not clock.getDelayedCalls()


# -- from which images devices asked -----------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_latest_bases_come_first(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    asked = catalogue.asked
    digest = Digest.parse("sha256:" + "ab" * 32)
    try:
        await asked.note(BASE, TARGET, 1000)
        await asked.note(Reference("", "v2/other", digest=digest), TARGET, 2000)
        await asked.note(Reference("", "v2/third", tag="latest"), TARGET, 3000)
        await asked.note(BASE, OTHER, 4000)
        found = await asked.bases(TARGET.repository, 9)
        assert found == [
            Reference("", "v2/third", tag="latest"),
            Reference("", "v2/other", digest=digest),
            BASE,
        ]
        # Noted so lately that it is not written again, and then it is.
        await asked.note(BASE, TARGET, 1000 + REFRESH_SECONDS - 1)
        assert (await asked.bases(TARGET.repository, 1))[0].repository == "v2/third"
        await asked.note(BASE, TARGET, 1000 + REFRESH_SECONDS)
        assert await asked.bases(TARGET.repository, 1) == [BASE]
        # Each repository once, as it was asked for last.
        await asked.note(Reference("", "v2/base", tag="other"), TARGET, 9000)
        assert await asked.bases(TARGET.repository, 2) == [
            Reference("", "v2/base", tag="other"),
            found[0],
        ]
        # A clock that is far ahead for one request deletes nothing.
        await asked.note(BASE, TARGET, 9000 + KEPT_SECONDS + 1)
        assert len(await asked.bases(TARGET.repository, 9)) == 3
    finally:
        await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_so_many_and_no_more_are_kept(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    asked = UpdateHistory(database, most=3)
    try:
        for number in range(5):
            await asked.note(Reference("", f"v2/{number}"), TARGET, 1000 + number)
        assert [base.repository for base in await asked.bases(TARGET.repository, 9)] == [
            "v2/4",
            "v2/3",
            "v2/2",
        ]
    finally:
        await database.close()
