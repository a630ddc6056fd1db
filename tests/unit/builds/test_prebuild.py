"""Lists of wanted deltas, and the images from which devices updated.

The build service is a double that answers when and as the tests say. Lists with the real one are
in tests/server/test_prepare.py.
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
    MAX_JOBS,
    MAX_OPEN,
    QUEUE_PAUSE,
    Budget,
    Job,
    PrebuildLists,
    Preparation,
)
from obdelta.builds.queue import Priority
from obdelta.builds.types import Answer, FullPull
from obdelta.errors import QueueFull, StillBuilding, TooManyRequests
from obdelta.oci import Digest, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import Kind
from obdelta.store.catalogue.tables.refreshed_rows import (
    KEPT_SECONDS,
    REFRESH_SECONDS,
    UpdateHistory,
)
from tests.support.store import REACTOR

BASE, TARGET, OTHER = (Reference("", f"v2/{name}") for name in ("base", "target", "other"))
NOBODY = Credentials.anonymous()


class Deltas:
    """A double: the test gives the answers, in any order."""

    def __init__(self) -> None:
        self.watchers: list[Any] = []
        self.requests: list[tuple[str, str]] = []
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
        self.requests.append((base.repository, target.repository))
        answer: Deferred[Answer] = Deferred()
        self.answers.append(answer)
        return await answer


def begun(at_once: int = 2) -> tuple[Deltas, Clock, PrebuildLists]:
    deltas, clock = Deltas(), Clock()
    return deltas, clock, PrebuildLists(deltas, clock, at_once, "delta.example.com")


def states(preparation: Preparation) -> list[str]:
    return [job.state for job in preparation.jobs]


def test_few_pairs_are_built_at_once_and_each_pair_once() -> None:
    deltas, _, preparing = begun(at_once=1)
    preparation = preparing.begin([(BASE, TARGET), (BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    assert states(preparation) == ["building", "waiting"] and deltas.requests == [
        ("v2/base", "v2/target")
    ]
    reported: list[Job | None] = []
    preparation.listeners.append(reported.append)
    deltas.answers[0].callback(FullPull("the delta is too large"))
    assert states(preparation) == ["full-pull", "building"]
    deltas.answers[1].callback(FullPull("nor this"))
    assert states(preparation) == ["full-pull", "full-pull"]
    assert reported == [preparation.jobs[1], preparation.jobs[0], preparation.jobs[1], None]
    assert preparing.find(preparation.id) is preparation
    assert preparing.find(preparation.jobs[1].id) is preparation.jobs[1]


def test_a_full_queue_is_tried_again_later() -> None:
    deltas, clock, preparing = begun()
    preparation = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    for attempt in range(1, 4):
        deltas.answers[-1].errback(QueueFull(7))
        assert states(preparation) == ["building"] and len(deltas.requests) == attempt
        clock.advance(QUEUE_PAUSE)
        assert len(deltas.requests) == attempt + 1
    deltas.answers[-1].errback(StillBuilding())
    assert states(preparation) == ["failed"] and preparation.done and not clock.getDelayedCalls()


def test_an_unexpected_error_fails_its_job_only() -> None:
    deltas, _, preparing = begun()
    preparation = preparing.begin([(BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    deltas.answers[0].errback(ZeroDivisionError("secret"))
    deltas.answers[1].callback(FullPull("no"))
    assert states(preparation) == ["failed", "full-pull"]
    assert "secret" not in str(preparation.as_json())


def test_lists_are_bounded_and_finished_lists_are_forgotten() -> None:
    deltas, _, preparing = begun(at_once=1000)
    first = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    for _ in range(MAX_OPEN - 1):
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


def test_fewer_long_lists_are_remembered() -> None:
    deltas, _, preparing = begun(at_once=1000)
    lists = []
    for _ in range(6):
        lists.append(
            preparing.begin(
                [(Reference("", f"v2/{n}"), TARGET) for n in range(MAX_JOBS)], ["v3"], NOBODY
            )
        )
        for answer in deltas.answers[-MAX_JOBS:]:
            answer.callback(FullPull("no"))
    last = preparing.begin([(BASE, TARGET)], ["v3"], NOBODY)
    remembered = [one for one in lists if preparing.find(one.id) is one]
    assert remembered == lists[-(KEPT_JOBS // MAX_JOBS) :] and preparing.find(last.id) is last


@pytest.mark.parametrize("full", [False, True])
@pytest_twisted.ensureDeferred
async def test_stopping_the_server_ends_lists(full: bool) -> None:
    deltas, clock, preparing = begun(at_once=1)
    preparation = preparing.begin([(BASE, TARGET), (OTHER, TARGET)], ["v3"], NOBODY)
    if full:
        deltas.answers[0].errback(QueueFull(7))
    await preparing.close()
    assert preparation.done and states(preparation) == ["failed", "failed"]
    assert deltas.requests == [("v2/base", "v2/target")]
    assert not clock.getDelayedCalls()


# -- from which images devices asked -----------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_latest_bases_come_first(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    requests = catalogue.requested_updates
    digest = Digest.parse("sha256:" + "ab" * 32)
    try:
        await requests.note(BASE, TARGET, 1000)
        await requests.note(Reference("", "v2/other", digest=digest), TARGET, 2000)
        await requests.note(Reference("", "v2/third", tag="latest"), TARGET, 3000)
        await requests.note(BASE, OTHER, 4000)
        found = await requests.bases(TARGET.repository, 9)
        assert found == [
            Reference("", "v2/third", tag="latest"),
            Reference("", "v2/other", digest=digest),
            BASE,
        ]
        # Recorded so recently that it is not written again, and later it is.
        await requests.note(BASE, TARGET, 1000 + REFRESH_SECONDS - 1)
        assert (await requests.bases(TARGET.repository, 1))[0].repository == "v2/third"
        await requests.note(BASE, TARGET, 1000 + REFRESH_SECONDS)
        assert await requests.bases(TARGET.repository, 1) == [BASE]
        # Each repository once, with its last request.
        await requests.note(Reference("", "v2/base", tag="other"), TARGET, 9000)
        assert await requests.bases(TARGET.repository, 2) == [
            Reference("", "v2/base", tag="other"),
            found[0],
        ]
        # A clock that is far in the future for one request deletes nothing.
        await requests.note(BASE, TARGET, 9000 + KEPT_SECONDS + 1)
        assert len(await requests.bases(TARGET.repository, 9)) == 3
    finally:
        await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_the_number_of_kept_bases_is_bounded(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    requests = UpdateHistory(database, most=3)
    try:
        for number in range(5):
            await requests.note(Reference("", f"v2/{number}"), TARGET, 1000 + number)
        assert [base.repository for base in await requests.bases(TARGET.repository, 9)] == [
            "v2/4",
            "v2/3",
            "v2/2",
        ]
    finally:
        await database.close()


def test_a_budget_skips_what_comes_after_it_is_used_up() -> None:
    deltas, clock, preparing = begun(at_once=1)
    changes: list[str] = []
    preparation = preparing.begin(
        [(BASE, TARGET), (OTHER, TARGET), (TARGET, BASE)], ["v3"], NOBODY, Budget(10.0, 1)
    )
    preparation.listeners.append(lambda job: changes.append("end" if job is None else job.state))
    clock.advance(9)
    deltas.answers[0].callback(FullPull("nothing in common", "not-worth"))
    assert states(preparation) == ["full-pull", "building", "waiting"]  # a second is left
    clock.advance(2)
    deltas.answers[1].callback(FullPull("nothing in common", "not-worth"))
    assert states(preparation) == ["full-pull", "full-pull", "skipped"]
    assert preparation.jobs[2].reason == "the release's budget of seconds is used up"
    assert preparation.done and changes[-1] == "end" and len(deltas.requests) == 2
