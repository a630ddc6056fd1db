"""The watcher of releases: what it hands over, when it asks again, and what it survives.

The API is the tests' double over real HTTP; the delta service answers as the test says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import Clock, deferLater

from obdelta.builds.prebuild import PrebuildLists
from obdelta.builds.queue import Priority
from obdelta.builds.types import Answer as DeltaAnswer
from obdelta.builds.types import FullPull
from obdelta.concurrency.tasks import Threads
from obdelta.errors import UpstreamUnavailable
from obdelta.fleet.api_client import ApiClient, token_reader
from obdelta.fleet.releases import FleetReader
from obdelta.fleet.watcher import MAX_PAUSE, ReleaseWatcher, Rules
from obdelta.observability import Metrics
from obdelta.oci import Digest, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import Kind
from tests.support.openbalena_api import TOKEN, Answer, OpenBalenaApi, api, retries_are_quick
from tests.support.store import REACTOR, threads
from tests.support.waiting import eventually

__all__ = ["api", "retries_are_quick", "threads"]


NOW = 1_800_000_000.0
POLL = 60.0
NOBODY = Credentials.anonymous()


class Deltas:
    """A double of the delta service: every delta is useless; requests are recorded."""

    def __init__(self) -> None:
        self.watchers: list[Any] = []
        self.requested: list[tuple[str, str]] = []

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
    ) -> DeltaAnswer:
        assert (kind, priority, credentials) == ("v3", Priority.PREPARED, NOBODY)
        self.requested.append((base.repository, target.repository))
        return FullPull("the images have nothing in common", "not-worth", 100)


class Watched:
    """A watcher and the parts around it. Its clock is the test's, except for the API's
    connections.
    """

    def __init__(self, api: OpenBalenaApi, catalogue: Catalogue, client: ApiClient) -> None:
        self.api, self.catalogue, self.deltas, self.clock = api, catalogue, Deltas(), Clock()
        self.metrics = Metrics()
        self.watcher = ReleaseWatcher(
            reader=FleetReader(client, [api.registry]),
            images=catalogue.fleet_images,
            lists=PrebuildLists(self.deltas, self.clock, 2, "delta.example.com"),
            credentials=NOBODY,
            rules=Rules(poll=POLL, devices=1, rollback=0, seconds=3600.0, bytes=1 << 30),
            metrics=self.metrics,
            clock=self.clock,
            now=lambda: NOW,
        )

    async def poll(self) -> None:
        """Runs one poll, and all the work that follows."""
        self.watcher.poll()
        await self.settled()

    async def settled(self) -> None:
        await deferLater(REACTOR, 0.01)
        await eventually("it is idle", lambda: self.watcher.idle)

    def timers(self) -> list[float]:
        return [call.getTime() - self.clock.seconds() for call in self.clock.getDelayedCalls()]


@asynccontextmanager
async def watching(api: OpenBalenaApi, threads: Threads, folder: Path) -> AsyncIterator[Watched]:
    client = ApiClient.connect(REACTOR, api.url, token_reader(TOKEN, threads))
    catalogue = await Catalogue.open(folder / "catalogue.sqlite", REACTOR)
    watched = Watched(api, catalogue, client)
    try:
        yield watched
    finally:
        await watched.watcher.close()
        await client.close()
        await catalogue.close()


def repository(number: int) -> str:
    return f"v2/{number:032x}"


def two_releases(api: OpenBalenaApi, devices: int = 3) -> tuple[int, int]:
    """A fleet whose devices run the first of two releases, the second just finalized."""
    when = datetime.fromtimestamp(NOW, UTC)
    fleet = api.application("acme")
    first = api.release(
        fleet, {"web": (repository(1), None)}, finalized=when - timedelta(days=9), version="1.0.0"
    )
    api.devices(first, devices)
    second = api.release(
        fleet, {"web": (repository(2), "sha256:" + "ab" * 32)}, finalized=when, version="2.0.0"
    )
    return first, second


@pytest_twisted.ensureDeferred
async def test_a_finalized_release_is_prepared_once_and_named(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    two_releases(api)
    async with watching(api, threads, tmp_path) as watched:
        await watched.poll()
        await watched.poll()
        assert watched.deltas.requested == [(repository(1), repository(2))]
        (entry,) = watched.watcher.releases.values()
        assert (entry.state, entry.bases, entry.devices) == ("done", 1, 3)
        assert entry.counts() == {"full-pull": 1}
        assert watched.watcher.note() == (
            "fleet: openBalena's API answers; releases being prepared: 0"
        )
        names = await watched.catalogue.named_images.of([Digest("ab" * 32)])
        assert [str(name) for name in names.values()] == ["acme/web 2.0.0 (c0ffee)"]
        _, text = await watched.metrics.text()
        assert b'obdelta_fleet_prepared_deltas_total{fleet="acme",state="full-pull"} 1.0' in text
        assert b'obdelta_fleet_polls_total{result="ok"} 2.0' in text


@pytest_twisted.ensureDeferred
async def test_a_draft_is_prepared_when_it_is_finalized(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    _, second = two_releases(api)
    when = api.tables["release"][second]["is_finalized_at__date"]
    api.tables["release"][second]["is_finalized_at__date"] = None
    async with watching(api, threads, tmp_path) as watched:
        await watched.poll()
        assert watched.deltas.requested == []
        api.tables["release"][second]["is_finalized_at__date"] = when
        await watched.poll()
        assert len(watched.deltas.requested) == 1


@pytest_twisted.ensureDeferred
async def test_a_release_of_the_future_hides_no_other(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    """The clock of the API may be wrong."""
    _, second = two_releases(api)
    api.tables["release"][second]["update_timestamp"] = "9999-01-01T00:00:00.000Z"
    async with watching(api, threads, tmp_path) as watched:
        await watched.poll()
        fleet = api.application("other")
        when = datetime.fromtimestamp(NOW, UTC)
        old = api.release(fleet, {"web": (repository(3), None)}, finalized=when - timedelta(days=9))
        api.devices(old, 1)
        api.release(fleet, {"web": (repository(4), None)}, finalized=when)
        await watched.poll()
        assert watched.deltas.requested[-1] == (repository(3), repository(4))


@pytest_twisted.ensureDeferred
async def test_a_failing_api_is_reported_and_polled_less_often(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    two_releases(api)
    api.tokens = set()
    async with watching(api, threads, tmp_path) as watched:
        await watched.poll()
        assert "api-token is wrong, has expired" in (watched.watcher.problem or "")
        assert watched.watcher.note().startswith("fleet: openBalena's API: 127.0.0.1:")
        assert watched.watcher.problem_since == NOW
        assert watched.timers() == [2 * POLL]
        for _ in range(6):
            await watched.poll()
        assert watched.timers() == [MAX_PAUSE]
        api.tokens = {TOKEN}
        watched.clock.advance(MAX_PAUSE)
        await watched.settled()
        assert watched.watcher.problem is None
        assert watched.timers() == [POLL]
        assert len(watched.deltas.requested) == 1


@pytest_twisted.ensureDeferred
async def test_a_release_whose_devices_cannot_be_read_is_tried_again(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    two_releases(api)
    api.instead = lambda path: Answer(500) if "is_running_on" in path else None
    async with watching(api, threads, tmp_path) as watched:
        await watched.poll()
        (entry,) = watched.watcher.releases.values()
        assert entry.state == "failed" and "answers 500" in (entry.problem or "")
        assert watched.deltas.requested == []
        api.instead = lambda _path: None
        await watched.poll()
        assert len(watched.deltas.requested) == 1
        assert [entry.state for entry in watched.watcher.releases.values()] == ["done"]


@pytest_twisted.ensureDeferred
async def test_a_delta_that_fails_does_not_prevent_the_others(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = two_releases(api)
    fleet = api.tables["release"][first]["application"]
    api.devices(api.release(fleet, {"web": (repository(3), None)}, draft=True), 9)
    async with watching(api, threads, tmp_path) as watched:
        answer = watched.deltas.delta

        async def failing(kind: Kind, base: Reference, *rest: Any, **more: Any) -> DeltaAnswer:
            if base.repository == repository(3):
                raise UpstreamUnavailable("it is away")
            return await answer(kind, base, *rest, **more)

        monkeypatch.setattr(watched.deltas, "delta", failing)
        await watched.poll()
        (entry,) = watched.watcher.releases.values()
        assert entry.counts() == {"failed": 1, "full-pull": 1}
        assert [job.base.repository for job in entry.jobs] == [repository(3), repository(1)]
