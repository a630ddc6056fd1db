"""Jobs that other programs wrote into a real redis-server."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from obdelta.builds.workers.build_job import MAX_FIELD, progress
from obdelta.builds.workers.job_queue import JobQueue, JobState
from tests.support.redis import running_redis


class Bomb:
    """Makes a directory where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.folder,)  # type: ignore[return-value]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[redis.Redis]:
    with (
        running_redis(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as made,
    ):
        yield made


@pytest.fixture
def jobs(client: redis.Redis) -> JobQueue:
    made = JobQueue(client, "obdelta:0123456789abcdef:", "registry2.example.com", "1-serve")
    made.put("work", {"pair": 1}, "base", urgent=True)
    return made


def test_no_pickle_is_read(jobs: JobQueue, client: redis.Redis, tmp_path: Path) -> None:
    made = pickle.dumps(Bomb(tmp_path / "made"))
    key = f"rq:job:{jobs.job_id('work')}"
    client.hset(key, mapping={"data": zlib.compress(made), "meta": made, "result": made})
    client.hset(key, "status", "finished")
    results = f"rq:results:{jobs.job_id('work')}"
    client.xadd(results, {"type": "1", "return_value": base64.b64encode(made)})
    assert jobs.states(["work"])["work"][0] == JobState("finished")
    jobs.cancel("work")
    # The next request for the work replaces it.
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    assert jobs.states(["work"])["work"][0] == JobState("queued")
    assert not (tmp_path / "made").exists()


def test_long_values_are_not_read(jobs: JobQueue, client: redis.Redis) -> None:
    key, results = (f"rq:{kind}:{jobs.job_id('work')}" for kind in ("job", "results"))
    much = b"x" * (MAX_FIELD + 1)
    client.hset(key, mapping={"status": "finished", "meta": much, "origin": much})
    client.xadd(results, {"type": "1", "return_value": much})
    assert jobs.states(["work"])["work"] == (JobState("finished"), "")
    # A few bytes that would be gigabytes, and such a few bytes compressed once more.
    once = zlib.compress(b"[" + b" " * (64 << 20))
    for data in (once, zlib.compress(once)):
        client.hset(key, mapping={"status": "queued", "data": data})
        jobs.cancel("work")
        jobs.put("work", {"pair": 1}, "base", urgent=True)
        assert (client.hstrlen(key, "data") or 0) < 1000


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
def test_keys_of_another_type_are_replaced(jobs: JobQueue, client: redis.Redis, kind: str) -> None:
    key = f"rq:job:{jobs.job_id('work')}"
    client.delete(key)
    if kind == "string":
        client.set(key, "no job")
    elif kind == "list":
        client.rpush(key, "no job")
    else:
        client.hset(key, "status", b"\xff")
    states = jobs.states(["work"])
    assert states["work"][0] is None or states["work"][0].status == "\ufffd"
    jobs.put("work", {"pair": 1}, "base", urgent=True)
    assert jobs.states(["work"])["work"][0] == JobState("queued")


@pytest.mark.parametrize("meta", [b"[" * 60_000, b"\x80", b"[]", b'{"a": [1]}', b'{"a": NaN}'])
def test_other_json_is_no_progress(meta: bytes) -> None:
    assert progress(meta) == {}


def test_progress_is_read() -> None:
    found = {"stage": "match", "done": 3}
    assert progress(json.dumps({**found, "huge": 1 << 70, "lines": "a\nb"}).encode()) == found
