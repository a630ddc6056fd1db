"""``builds = workers``: two frontends, two workers, one redis-server, one docker-registry with
tokens. Kills are in tests/faults/test_worker_kills.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as Client
from rq.serializers import JSONSerializer

from obdelta.builds.workers.build_job import BuildJob
from obdelta.builds.workers.build_requests import read_request, result_of_row
from obdelta.device.update import Update
from obdelta.oci import Digest
from obdelta.rootfs.compare import differences
from obdelta.rsync.proof import copy_for_proof
from obdelta.store.catalogue.records import DeltaKey
from tests.server.test_replicas_v2 import DELAYED, located, made
from tests.server.test_v2 import get, trees
from tests.support.images import TARGET_REPOSITORY
from tests.support.processes import until
from tests.support.redis import RunningRedis
from tests.support.registry import BUILDER_TOKEN
from tests.support.server import RunningServer
from tests.support.shared_servers import PASSWORD, Start, update
from tests.support.stack import Stack
from tests.support.store import a_row
from tests.support.workers import outcomes


def operators(server: RunningServer, path: str) -> str:
    with urllib.request.urlopen(f"{server.operator_url}{path}", timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("publish", ["serve", "registry"])
def test_one_worker_builds_and_both_frontends_serve(
    stack: Stack, start: Start, redis: RunningRedis, publish: str, tmp_path: Path
) -> None:
    one, other = start("one", publish=publish), start("other", publish=publish)
    workers = [start(f"worker-{number}", publish=publish, worker=True) for number in range(2)]
    until("they are seen", lambda: "workers: 2 alive" in operators(one, "/readyz"))
    begin = threading.Barrier(6)

    def device(number: int) -> Update:
        frontend, pulled = ((one, other), (other, one))[number % 2]
        begin.wait(30)
        from_server = pulled.url if publish == "serve" else None
        return update(stack, frontend, from_server, tmp_path / f"device-{number}")

    with ThreadPoolExecutor(6) as pool:
        names = {done.name for done in pool.map(device, range(6))}
    (name,) = names
    host = "127.0.0.1:7" if publish == "serve" else stack.registry.host
    assert name.startswith(f"{host}/{TARGET_REPOSITORY}:delta-")
    # One worker has it, and builds the other form after it.
    (builder,) = (worker for worker in workers if outcomes(worker))
    assert set(outcomes(builder)) == {"ready"} and len(outcomes(builder)) <= 2
    assert set(outcomes(one, other)) == {"elsewhere"}
    assert not list((one.state_dir / "layers").iterdir()), "a frontend fetched layers"
    # Redis holds no credential.
    dump = redis_dump(redis)
    assert TARGET_REPOSITORY in dump
    assert BUILDER_TOKEN not in dump and stack.token() not in dump
    assert PASSWORD not in "".join(server.log for server in (one, other, *workers))


@pytest.mark.parametrize("publish", ["serve", "registry"])
def test_a_batch_is_built_by_one_worker_and_served_by_both_frontends(
    stack: Stack, start: Start, redis: RunningRedis, publish: str, tmp_path: Path
) -> None:
    one, other = start("one", publish=publish), start("other", publish=publish)
    workers = [start(f"worker-{number}", publish=publish, worker=True) for number in range(2)]
    until("they are seen", lambda: "workers: 2 alive" in operators(one, "/readyz"))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda server: located(stack, server), (one, other, one, other)))
    assert len({made(path) for path in paths}) == 1
    assert sorted(outcomes(*workers)) == ["ready"]
    assert set(outcomes(one, other)) == {"elsewhere"}
    for server in (one, other):
        for folder in ("layers", "trees"):
            assert not list((server.state_dir / folder).iterdir()), f"a {folder} was fetched"
    # A download that begins at one frontend ends at the other.
    status, _, whole = get(one.url + paths[0])
    assert status == 200 and hashlib.sha256(whole).hexdigest().startswith(made(paths[0]))
    half = len(whole) // 2
    for path in paths:
        status, _, rest = get(other.url + path, Range=f"bytes={half}-")
        assert (status, rest) == (206, whole[half:])
    base, target = trees(stack.pair, tmp_path)
    device = tmp_path / "device"
    copy_for_proof(base, target, device)
    command = ["rsync", "--archive", "--delete", "--fake-super", "--read-batch=-", f"{device}/"]
    subprocess.run(command, input=whole.partition(b"\0")[2], check=True, capture_output=True)
    assert list(differences(device, target)) == []
    # A supervisor that needs a delay gets it from any of them.
    delayed = located(stack, one, DELAYED)
    assert len(get(other.url + delayed)[2]) > len(whole)
    dump = redis_dump(redis)
    assert TARGET_REPOSITORY in dump
    assert BUILDER_TOKEN not in dump and stack.token() not in dump


def test_a_worker_without_rsync_fails_a_batch_and_says_so(
    stack: Stack, start: Start, tmp_path: Path
) -> None:
    # The frontend needs no rsync itself.
    (tmp_path / "empty").mkdir()
    without = {"PATH": str(tmp_path / "empty")}
    frontend = start("frontend", more=without)
    pause = {"obdelta.builds.workers.job_loop.PAUSE_SECONDS": 0.1}
    worker = start("worker", worker=True, more=without, constants=pause)
    assert "rsync" not in operators(frontend, "/readyz") + frontend.log
    assert "rsync is missing" in operators(worker, "/readyz")
    _, headers, _ = stack.ask(frontend, version=2)
    assert "full-pull" in headers["location"]
    assert "outcome=failed" in frontend.log and "rsync is missing" in frontend.log


QUICK = {
    "obdelta.builds.replicas.leases.LEASE_SECONDS": 4,
    "obdelta.builds.workers.job_loop.HEARTBEAT_SECONDS": 6,
    "obdelta.builds.workers.job_loop.BEAT_EVERY": 1,
}
"""A dead worker's job is given to another one sooner."""


def is_running(redis: RunningRedis) -> bool:
    """Whether a worker has begun a job."""
    return redis.ask("-a", PASSWORD, "--no-auth-warning", "EVAL", _STARTED, "0") == "1"


_STARTED = """
for _, key in ipairs(redis.call('KEYS', 'rq:job:*')) do
  if redis.call('TYPE', key)['ok'] == 'hash'
    and redis.call('HGET', key, 'status') == 'started' then return 1 end
end
return 0
"""


def test_the_job_of_a_killed_worker_is_done_by_another(
    stack: Stack, start: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    frontend = start("frontend", constants=QUICK)
    victim = start("victim", worker=True, constants=QUICK)
    with ThreadPoolExecutor(1) as pool:
        device = pool.submit(update, stack, frontend, frontend.url, tmp_path / "device")
        until("a worker has the job", lambda: is_running(redis))
        victim.process.kill()
        victim.process.wait()
        other = start("other", worker=True, constants=QUICK)
        assert device.result(120).is_delta
    assert "ready" in outcomes(other) or "ready" in outcomes(victim)
    assert outcomes(frontend) == ["elsewhere"]


def test_redis_loses_its_data_during_a_build(
    stack: Stack, start: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    frontend = start("frontend", constants=QUICK)
    workers = [start(f"worker-{number}", worker=True, constants=QUICK) for number in range(2)]
    with ThreadPoolExecutor(1) as pool:
        device = pool.submit(update, stack, frontend, frontend.url, tmp_path / "device")
        until("a worker has the job", lambda: is_running(redis))
        redis.stop()
        redis.start()
        assert device.result(120).is_delta
    assert 1 <= len(outcomes(*workers)) <= 4  # each of two forms twice at most
    assert outcomes(frontend) == ["elsewhere"]


def test_a_redis_that_became_a_replica_is_reported_once(
    stack: Stack, start: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    frontend = start("frontend", request_timeout="3")
    worker = start("worker", worker=True)
    until("the worker is seen", lambda: "1 alive" in operators(frontend, "/readyz"))
    assert "jobs: 0 of 2 slots are busy" in operators(worker, "/readyz")
    ask = ("-a", PASSWORD, "--no-auth-warning", "REPLICAOF")
    redis.ask(*ask, "127.0.0.1", "1")
    why = "Redis is unavailable: it is a read-only replica"
    assert stack.ask(frontend, extra="")[0] == 504
    until("the worker notices it", lambda: f"jobs: {why}" in operators(worker, "/readyz"))
    assert "workers: Redis is unavailable (it is a read-only" in operators(frontend, "/readyz")
    redis.ask(*ask, "NO", "ONE")
    assert update(stack, frontend, frontend.url, tmp_path / "device").is_delta
    for server in (frontend, worker):
        lines = [line for line in server.log.splitlines() if why in line]
        assert len([line for line in lines if ".workers." in line]) == 1, lines


def test_without_a_worker_builds_wait_and_health_says_so(
    stack: Stack, start: Start, tmp_path: Path
) -> None:
    frontend = start("frontend", request_timeout="1")
    assert "workers: none is alive" in operators(frontend, "/readyz")
    until(
        "it needs attention",
        lambda: "workers: none is alive: builds wait" in frontend.attention,
    )
    status, _, _ = stack.ask(frontend, extra="")
    assert status in (502, 504)
    assert "obdelta_jobs_waiting" in operators(frontend, "/metrics")
    until(
        "the job is counted",
        lambda: 'obdelta_jobs_waiting{queue="devices"} 1.0' in operators(frontend, "/metrics"),
    )
    start("worker", worker=True)
    assert update(stack, frontend, frontend.url, tmp_path / "device").is_delta
    until("it needs no attention", lambda: frontend.attention == [])


def test_a_device_pulls_in_full_when_no_worker_was_alive_for_long(
    stack: Stack, start: Start
) -> None:
    brief = {"obdelta.builds.workers.dispatcher.NO_WORKER_SECONDS": 1}
    frontend = start("frontend", constants=brief)
    for version in (3, 2):
        status, headers, body = stack.ask(frontend, version=version)
        if version == 3:
            assert (status, json.loads(body)) == (200, {"name": stack.names()[1]})
        else:
            assert status == 300 and "full-pull" in headers["location"]
    assert "reason=build worker: no worker was alive for 15 minutes" in frontend.log
    # The jobs are there, and a worker that starts does them, though no device asks.
    worker = start("worker", worker=True, constants=brief)
    until("both are built", lambda: outcomes(worker).count("ready") >= 2, 60)
    until("they are found", lambda: stack.name(frontend) != stack.names()[1], 60)


def test_a_forged_result_in_redis_is_refused(
    stack: Stack, start: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    # A forged worker says that a tag of its choice is the delta.
    frontend = start("frontend", request_timeout="20")
    client: Client = Client.from_url(redis.url, password=PASSWORD)
    with client, ThreadPoolExecutor(1) as pool:
        response = pool.submit(stack.ask, frontend, extra="")
        until("a job waits", lambda: list(client.scan_iter("rq:job:*")) != [])
        (key,) = client.scan_iter("rq:job:*")
        job = BuildJob.fetch(
            key.decode().removeprefix("rq:job:"), connection=client, serializer=JSONSerializer
        )
        request = read_request(job.args[0])
        assert request is not None
        wanted = DeltaKey("v3", request.recipe, request.base, request.target, request.form)
        row = replace(a_row(wanted, Digest.of(b"of another tenant"), created=1), tag="latest")
        # A value of another type ends neither the polls of the frontend nor the job.
        client.delete(key)
        client.set(key, b"\x80\x04")
        until("it is queued again", lambda: client.type(key) == b"hash")
        client.hset(key, "meta", b"[" * 60_000)
        result = base64.b64encode(json.dumps(result_of_row(row)).encode())
        client.xadd(f"rq:results:{job.id}", {"type": "1", "return_value": result})
        client.hset(key, mapping={"status": "finished", "meta": b"{}"})
        status, _, body = response.result(60)
        assert status >= 500 and b"latest" not in body
    assert "a delta that the registry does not have" in frontend.log
    start("worker", worker=True)
    assert update(stack, frontend, frontend.url, tmp_path / "device").is_delta


def redis_dump(redis: RunningRedis) -> str:
    """All keys and values, as text; RQ compresses some."""
    client: Client = Client.from_url(redis.url, password=PASSWORD)
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"hash": client.hgetall,
        b"string": client.get,
        b"set": client.smembers,
        b"stream": lambda key: client.xrange(key),
        b"list": lambda key: client.lrange(key, 0, -1),
        b"zset": lambda key: client.zrange(key, 0, -1),
    }
    found = []
    for key in client.scan_iter("*"):
        assert isinstance(key, bytes)
        kind = client.type(key)
        if kind not in readers:
            continue  # it has expired
        value = readers[kind](key)
        found.append(f"{key!r} {value}")
        for each in value.values() if isinstance(value, dict) else ():
            with suppress(zlib.error):
                found.append(str(zlib.decompress(each)))
    client.close()
    return "\n".join(found)
