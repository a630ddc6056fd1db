"""The loops of a worker on a real redis-server: which jobs they take, whose jobs they look after,
and what they make of jobs that others wrote.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import redis
from rq import Queue

from obdelta.builds.workers import job_loop
from obdelta.builds.workers.job_loop import HEARTBEAT_SECONDS, JobLoop, JobLoops
from obdelta.builds.workers.job_queue import RETRIES, JobQueue, JobState, Load
from tests.support.job_queue import (
    DEVICES,
    HOST,
    PREFIX,
    VERSION,
    Builder,
    builder,
    client,
    jobs,
    loops,
    server,
    state_of,
    waiting,
)
from tests.support.processes import until
from tests.support.redis import RunningRedis

__all__ = ["builder", "client", "jobs", "loops", "server"]


def test_workers_of_another_version_get_no_job(
    jobs: JobQueue, client: redis.Redis, builder: Builder, loops: JobLoops
) -> None:
    other = JobQueue(client, PREFIX, HOST, "2-another")
    for queue in (jobs, other):
        queue.report_alive("w1", 2)
        queue.try_report_base("base", "w1")
    assert jobs.load() == Load(slots=2, workers=1, others=1)
    client.zadd(f"{PREFIX}workers", {"w0 4": 2_000_000_000.0})  # of a version before this
    assert jobs.load() == Load(slots=2, workers=1, others=2)
    jobs.report_gone("w1", 2)
    other.put("foreign", {}, "base", urgent=True)
    other.put("later", {}, "base", urgent=False)
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    builder.ends.set()
    until("its own one is built", lambda: state_of(jobs).status == "finished")
    until("the others wait again", lambda: other.load() == Load(1, 1, 2, 1, 1))
    assert other.states(["foreign"])["foreign"][0] == JobState("queued")
    assert [request for request, _ in builder.requests] == [{"pair": 1}]


def test_a_job_that_no_worker_builds_is_removed(
    jobs: JobQueue, client: redis.Redis, loops: JobLoops
) -> None:
    other = JobQueue(client, PREFIX, HOST, "2-another")
    other.put("foreign", {}, "base", urgent=True)
    client.hset(f"rq:job:{other.job_id('foreign')}", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    until("it is gone", lambda: other.states(["foreign"])["foreign"][0] is None)
    until("no list has it", lambda: waiting(client, DEVICES) == [])


def members(client: redis.Redis, key: bytes) -> list[bytes]:
    return [name for name in client.zrange(key, 0, -1) if isinstance(name, bytes)]


def clean(loop: JobLoop, client: redis.Redis) -> None:
    """Has a worker search for abandoned jobs, as one does every few seconds."""
    for key in client.scan_iter("rq:clean_registries:*"):
        client.delete(key)
    loop.clean_registries()


def test_a_job_that_a_worker_took_from_its_own_queue_is_found_when_it_is_gone(
    jobs: JobQueue, client: redis.Redis, builder: Builder, loops: JobLoops
) -> None:
    jobs.report_alive("w1", 1)
    jobs.try_report_base("base", "w1")
    jobs.put("work", {}, "base", urgent=True)
    until("it runs", lambda: state_of(jobs).status == "started")
    assert [queue for _, queue in builder.requests] == [f"obdelta:{HOST}:at:w1"]
    # Its worker gives no sign of life any more.
    (key,) = client.scan_iter("rq:wip:*")
    another = JobLoop(jobs, "w2", client, Builder().start, lambda: True)
    client.zadd(key, dict.fromkeys(members(client, key), 1))
    clean(another, client)
    assert client.hget(f"rq:job:{jobs.job_id('work')}", "retries_left") == b"2"


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_the_clocks_of_workers_decide_nothing(
    server: RunningRedis,
    jobs: JobQueue,
    client: redis.Redis,
    builder: Builder,
    loops: JobLoops,
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
) -> None:
    """A worker whose clock is wrong runs a job, while another one looks for abandoned jobs."""
    for module in ("registry", "executions"):
        monkeypatch.setattr(f"rq.{module}.current_timestamp", lambda: int(time.time()) + ahead)
    jobs.put("work", {}, "base", urgent=True)
    until("it runs", lambda: state_of(jobs).status == "started")
    (key,) = client.scan_iter("rq:wip:*")
    (name,) = members(client, key)
    seconds = client.time()[0]
    assert 0 < float(client.zscore(key, name) or 0) - int(seconds) <= HEARTBEAT_SECONDS
    another = JobLoop(jobs, "w2", client, builder.start, lambda: True)
    for _ in range(3):
        clean(another, client)
    assert state_of(jobs).status == "started" and waiting(client, DEVICES) == []
    # One without signs of life is abandoned.
    client.zadd(key, {name: int(seconds) - 1})
    clean(another, client)
    until("it waits again, or runs", lambda: state_of(jobs).status in ("queued", "started"))
    assert client.hget(f"rq:job:{jobs.job_id('work')}", "retries_left") == b"2"


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


def test_a_worker_that_builds_something_else_leaves_jobs_to_others(
    server: RunningRedis, jobs: JobQueue, client: redis.Redis, builder: Builder
) -> None:
    builder.free.clear()
    looked = threading.Event()

    def is_free() -> bool:
        looked.set()
        return builder.free.is_set()

    loop = JobLoop(jobs, "w1", client, builder.start, is_free)
    thread = threading.Thread(target=loop.work, kwargs={"logging_level": "CRITICAL"})
    thread.start()
    jobs.put("work", {}, "base", urgent=True)
    assert looked.wait(30)
    looked.clear()
    assert looked.wait(30), "it looks again and again"
    assert len(waiting(client, DEVICES)) == 1 and builder.requests == []
    builder.free.set()
    until("it runs", lambda: len(builder.requests) == 1)
    builder.ends.set()
    loop.stop()
    thread.join(60)
    assert not thread.is_alive()


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


def test_a_job_that_one_worker_cannot_build_goes_to_another(
    server: RunningRedis,
    jobs: JobQueue,
    builder: Builder,
    loops: JobLoops,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_loop, "PAUSE_SECONDS", 60.0)  # ends with the worker
    builder.outcome = {"error": "StoreFull", "reason": "the disk is full"}
    builder.ends.set()
    jobs.put("work", {}, "base", urgent=True)
    until("it waits again", lambda: builder.requests and state_of(jobs).status == "queued")
    able = Builder()
    able.ends.set()
    other = JobLoops(
        lambda: redis.Redis.from_url(server.url),
        lambda client: JobQueue(client, PREFIX, HOST, VERSION),
        "w2",
        1,
        able.start,
        lambda _slots: True,
    )
    thread = threading.Thread(target=other.serve)
    thread.start()
    until("the other one has built it", lambda: state_of(jobs).result == {"row": "text"})
    other.stop()
    thread.join(30)
    assert (len(builder.requests), len(able.requests)) == (1, 1)


def test_an_error_that_every_worker_has_is_the_result(
    jobs: JobQueue, builder: Builder, loops: JobLoops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_loop, "PAUSE_SECONDS", 0.01)
    builder.outcome = {"error": "ProgramUnusable", "reason": "rsync is missing"}
    builder.ends.set()
    jobs.put("work", {}, "base", urgent=True)
    until("it has ended", lambda: state_of(jobs).result == builder.outcome)
    assert len(builder.requests) == 1 + RETRIES


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
