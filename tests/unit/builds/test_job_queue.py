"""The job queue on a real redis-server."""

from __future__ import annotations

import redis

from obdelta.builds.workers.job_queue import JobQueue, Load
from tests.support.job_queue import (
    DEVICES,
    HOST,
    PREFIX,
    PREPARED,
    VERSION,
    client,
    jobs,
    server,
    waiting,
)

__all__ = ["client", "jobs", "server"]


def test_two_frontends_have_one_job(jobs: JobQueue, client: redis.Redis) -> None:
    other = JobQueue(client, PREFIX, HOST, VERSION)
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


def test_a_started_job_that_no_worker_runs_is_lost(jobs: JobQueue, client: redis.Redis) -> None:
    jobs.put("work", {}, "base", urgent=True)
    queue = jobs.states(["work"])["work"][1]
    client.lpop(DEVICES)
    client.hset(f"rq:job:{jobs.job_id('work')}", "status", "started")
    client.zadd(f"rq:executions:{jobs.job_id('work')}", {"run": 1e10})
    assert not jobs.is_lost("work", queue)
    # As after a fail-over to a replica of Redis that was behind.
    client.delete(f"rq:executions:{jobs.job_id('work')}")
    assert jobs.is_lost("work", queue)
