"""The job queue on a real redis-server, and what a loop makes of jobs that others wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue

from obdelta.builds.workers.job_loop import JobLoops, Outcome
from obdelta.builds.workers.job_queue import JobQueue, Load
from tests.support.processes import until
from tests.support.redis import RunningRedis, running_redis

PREFIX, HOST = "obdelta:0123456789abcdef:", "registry2.example.com"
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
    return JobQueue(client, PREFIX, HOST)


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
        lambda client: JobQueue(client, PREFIX, HOST),
        "w1",
        1,
        builder.start,
    )
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    builder.ends.set()
    made.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_two_frontends_have_one_job(jobs: JobQueue, client: redis.Redis) -> None:
    other = JobQueue(client, PREFIX, HOST)
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    other.put("work", {"pair": 1}, "base", urgent=True)
    assert len(waiting(client, DEVICES)) == 1
    assert jobs.load() == Load(devices=1)


def test_a_device_raises_what_is_only_prepared(jobs: JobQueue, client: redis.Redis) -> None:
    jobs.put("work", {}, "base", urgent=False)
    assert (len(waiting(client, PREPARED)), len(waiting(client, DEVICES))) == (1, 0)
    jobs.put("work", {}, "base", urgent=True)
    assert (len(waiting(client, PREPARED)), len(waiting(client, DEVICES))) == (0, 1)


def test_the_worker_that_has_the_base_gets_the_job_until_it_is_spread(
    jobs: JobQueue, client: redis.Redis
) -> None:
    jobs.report_alive("w1", 2)
    jobs.try_report_base("base", "w1")
    jobs.put("work", {}, "base", urgent=True)
    jobs.put("other", {}, "another base", urgent=True)
    own = f"obdelta:{HOST}:at:w1"
    assert (len(waiting(client, f"rq:queue:{own}")), len(waiting(client, DEVICES))) == (1, 1)
    assert jobs.states(["work"])["work"][1] == own
    assert jobs.load() == Load(devices=2, slots=2, workers=1)
    jobs.spread("work", own)
    assert (len(waiting(client, f"rq:queue:{own}")), len(waiting(client, DEVICES))) == (0, 2)
    # One that has stopped gets none.
    jobs.report_gone("w1", 2)
    jobs.put("third", {}, "base", urgent=True)
    assert len(waiting(client, DEVICES)) == 3


def test_a_job_that_no_queue_has_is_lost(jobs: JobQueue, client: redis.Redis) -> None:
    jobs.put("work", {}, "base", urgent=True)
    queue = jobs.states(["work"])["work"][1]
    assert not jobs.is_lost("work", queue)
    client.lpop(DEVICES)
    assert jobs.is_lost("work", queue)


def test_a_result_is_returned_and_a_new_request_starts_again(
    jobs: JobQueue, builder: Builder, loops: JobLoops
) -> None:
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    until("progress is seen", lambda: state_of(jobs).progress == builder.progress())
    assert state_of(jobs).status == "started"
    builder.ends.set()
    until("it has ended", lambda: state_of(jobs).result == {"row": "text"})
    assert builder.requests == [({"pair": 1}, f"obdelta:{HOST}:devices")]
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    until("it is built again", lambda: len(builder.requests) == 2)


def state_of(jobs: JobQueue) -> Any:
    state, _ = jobs.states(["work"])["work"]
    assert state is not None
    return state


def test_a_cancelled_job_ends(jobs: JobQueue, builder: Builder, loops: JobLoops) -> None:
    jobs.put("work", {}, "base", urgent=True)
    until("it runs", lambda: len(builder.requests) == 1)
    jobs.cancel("work")
    assert builder.cancelled.wait(30)


def test_a_worker_that_stops_leaves_its_job_to_another(
    jobs: JobQueue, client: redis.Redis, builder: Builder, loops: JobLoops
) -> None:
    jobs.put("work", {}, "base", urgent=True)
    until("it runs", lambda: len(builder.requests) == 1)
    loops.stop()
    builder.outcome = None
    builder.ends.set()
    until("it waits again", lambda: len(waiting(client, DEVICES)) == 1)
    assert state_of(jobs).status == "queued"


def test_no_code_that_redis_names_is_run(
    server: RunningRedis, jobs: JobQueue, builder: Builder, loops: JobLoops, tmp_path: Path
) -> None:
    # As RQ's own client writes jobs, with its pickles and callbacks.
    with redis.Redis.from_url(server.url) as client:
        name = f"obdelta:{HOST}:devices"
        folder = tmp_path / "made-by-a-job"
        Queue(name, connection=client).enqueue("os.mkdir", str(folder))
        job = jobs.devices.enqueue("os.mkdir", str(folder), on_success="os.mkdir")
        client.hset(job.key, "success_callback_name", "os.mkdir")
        client.hset(job.key, "webhooks", '[{"url": "http://127.0.0.1:9", "events": ["finished"]}]')
        builder.ends.set()
        jobs.put("work", {}, "base", urgent=True)
        until("the one after them is built", lambda: state_of(jobs).status == "finished")
    assert not folder.exists()
    assert all(not isinstance(request, bytes) for request, _ in builder.requests)
