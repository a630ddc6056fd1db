"""The job queue of workers on a real redis-server, and builds that end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from obdelta.builds.workers.job_loop import JobLoops, Outcome
from obdelta.builds.workers.job_queue import JobQueue
from tests.support.redis import RunningRedis, running_redis

PREFIX, HOST, VERSION = "obdelta:0123456789abcdef:", "registry2.example.com", "1-v2.2-v3.10-serve"
DEVICES = f"rq:queue:obdelta:{HOST}:devices"
PREPARED = f"rq:queue:obdelta:{HOST}:prepared"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningRedis]:
    with running_redis(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def client(server: RunningRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as made:
        yield made


@pytest.fixture
def jobs(client: redis.Redis) -> JobQueue:
    return JobQueue(client, PREFIX, HOST, VERSION)


def waiting(client: redis.Redis, queue: str) -> list[object]:
    found = client.lrange(queue, 0, -1)
    assert isinstance(found, list)
    return list(found)


class Builder:
    """Starts builds that end when the test says so."""

    def __init__(self) -> None:
        self.requests: list[tuple[object, str]] = []
        self.cancelled = threading.Event()
        self.outcome: Outcome = {"row": "text"}
        self.ends = threading.Event()
        self.free = threading.Event()
        self.free.set()

    def progress(self) -> dict[str, object]:
        return {"stage": "match", "done": 3}

    def cancel(self) -> None:
        self.cancelled.set()
        self.ends.set()

    def start(
        self, request: object, _waited: float, queue: str, ended: Callable[[Outcome], None]
    ) -> Builder:
        self.requests.append((request, queue))

        def run() -> None:
            self.ends.wait(30)
            ended(self.outcome)

        threading.Thread(target=run).start()
        return self


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def loops(server: RunningRedis, builder: Builder) -> Iterator[JobLoops]:
    """One slot of a worker, which takes jobs in a thread."""
    made = JobLoops(
        lambda: redis.Redis.from_url(server.url),
        lambda client: JobQueue(client, PREFIX, HOST, VERSION),
        "w1",
        1,
        builder.start,
        lambda slots: slots == 1 and builder.free.is_set(),
    )
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    builder.ends.set()
    made.stop()
    thread.join(30)
    assert not thread.is_alive()


def state_of(jobs: JobQueue) -> Any:
    state, _ = jobs.states(["work"])["work"]
    assert state is not None
    return state
