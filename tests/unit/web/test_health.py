"""Readiness: which part fails and why, at a cost that probes cannot raise."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.internet.task import Clock

from bench.registry import serving
from obdelta.concurrency.tasks import Threads
from obdelta.errors import StoreFull
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry.client import RegistryClient
from obdelta.registry.layouts.oci_layout import LayoutUpstream
from obdelta.web.operators.health import (
    CACHE_SECONDS,
    CHECK_TIMEOUT,
    Readiness,
    upstream_problem,
    workers_problem,
)
from tests.support.server import free_port, running_server
from tests.support.web import reactor


def fetch(url: str, accept: str = "*/*") -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_readiness_names_the_failing_part(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "registry") as registry,
        running_server(tmp_path / "one", upstream=registry) as server,
    ):
        assert fetch(f"{server.operator_url}/healthz") == (200, "ok\n")
        assert fetch(f"{server.operator_url}/healthz?format=json") == (200, '{"alive": true}\n')
        expected = "ready\nupstream: ok\nworkers: ok\nstore: ok\n"
        assert fetch(f"{server.operator_url}/readyz") == (200, expected)
        status, body = fetch(f"{server.operator_url}/readyz", "application/json")
        assert (status, json.loads(body)["ready"]) == (200, True)
    nobody = f"http://127.0.0.1:{free_port()}"
    with running_server(tmp_path / "two", upstream=nobody) as server:
        status, body = fetch(f"{server.operator_url}/readyz")
        assert status == 503
        assert body.startswith("not ready: upstream registry: cannot connect to 127.0.0.1:")
        _, metrics = fetch(f"{server.operator_url}/metrics")
        gauges = re.findall(r'^obdelta_ready\{check="(\w+)"\} (.*)$', metrics, re.MULTILINE)
        assert dict(gauges) == {"upstream": "0.0", "workers": "1.0", "store": "1.0"}
        assert "\nworkers: ok\nstore: ok\n" in body
        status, body = fetch(f"{server.operator_url}/readyz?format=json")
        report = json.loads(body)
        assert (status, report["ready"]) == (503, False)
        assert [name for name, check in report["checks"].items() if not check["ok"]] == ["upstream"]
        assert fetch(f"{server.operator_url}/healthz")[0] == 200


class Part:
    """A part that may fail; counts its checks."""

    def __init__(self) -> None:
        self.fetch = 0
        self.answer: Deferred[str | None] = Deferred()

    async def problem(self) -> str | None:
        self.fetch += 1
        return await self.answer


def found(readiness: Readiness) -> Deferred[dict[str, str | None]]:
    return ensureDeferred(readiness.problems())


@pytest_twisted.ensureDeferred
async def test_parallel_probes_share_one_check() -> None:
    clock, part = Clock(), Part()
    readiness = Readiness(clock)
    readiness.add("part", part.problem)
    probes = [found(readiness) for _ in range(5)]
    probes[0].addErrback(lambda _: None).cancel()
    part.answer.callback("it is ill")
    assert [await probe for probe in probes[1:]] == [{"part": "it is ill"}] * 4
    assert part.fetch == 1
    clock.advance(CACHE_SECONDS - 0.1)
    assert await found(readiness) == {"part": "it is ill"}
    assert part.fetch == 1
    part.answer = Deferred()
    part.answer.callback(None)
    clock.advance(0.2)
    assert await found(readiness) == {"part": None}
    assert part.fetch == 2


@pytest_twisted.ensureDeferred
async def test_good_results_are_cached_longer_than_bad_ones() -> None:
    clock, part = Clock(), Part()
    readiness = Readiness(clock)
    readiness.add("part", part.problem, cache_seconds=60)
    part.answer.callback(None)
    await found(readiness)
    clock.advance(59)
    await found(readiness)
    assert part.fetch == 1


@pytest_twisted.ensureDeferred
async def test_displays_get_fresh_results_except_of_costly_checks() -> None:
    clock, cheap, costly = Clock(), Part(), Part()
    readiness = Readiness(clock)
    readiness.add("cheap", cheap.problem)
    readiness.add("costly", costly.problem, cache_seconds=60)
    cheap.answer.callback(None)
    costly.answer.callback("it is ill")
    for _ in range(8):
        await readiness.problems(max_age=1)
        await readiness.problems(max_age=1)  # this one finds the result of the other
        clock.advance(1)
    assert (cheap.fetch, costly.fetch) == (8, 2)


@pytest_twisted.ensureDeferred
async def test_a_part_that_hangs_or_raises_is_not_ready() -> None:
    clock, hanging = Clock(), Part()

    async def full() -> str | None:
        raise StoreFull("no space left")

    readiness = Readiness(clock)
    readiness.add("hanging", hanging.problem)
    readiness.add("full", full)
    probe = found(readiness)
    clock.advance(CHECK_TIMEOUT)
    assert await probe == {"hanging": "no answer within 5 seconds", "full": "store: no space left"}


@pytest.mark.parametrize(
    ("command", "problem"), [(("/does/not/exist",), "cannot be started"), (("true",), "ended")]
)
@pytest_twisted.ensureDeferred
async def test_workers_that_cannot_start_are_a_problem(
    command: tuple[str, ...], problem: str
) -> None:
    pool = WorkerPool(reactor, 1, command=command)
    report = await workers_problem(pool)()
    assert report is not None
    assert problem in report
    await pool.close()


@pytest_twisted.ensureDeferred
async def test_one_live_worker_is_enough() -> None:
    pool = WorkerPool(reactor, 1)
    assert await workers_problem(pool)() is None
    pids = pool.pids
    assert len(pids) == 1
    assert await workers_problem(pool)() is None
    assert pool.pids == pids
    await pool.close()


@pytest_twisted.ensureDeferred
async def test_a_failure_of_the_upstream_is_retried_once() -> None:
    """A connection that was closed while it was idle is no problem; more retries cost time."""
    connections: list[Protocol] = []

    class Closing(Protocol):
        def connectionMade(self) -> None:
            connections.append(self)
            assert self.transport is not None
            self.transport.loseConnection()

    factory: ServerFactory[Protocol] = ServerFactory()
    factory.protocol = Closing
    port = reactor.listenTCP(0, cast(Any, factory), interface="127.0.0.1")
    url = f"http://127.0.0.1:{cast(IPv4Address, port.getHost()).port}"
    threads = Threads(reactor, reactor.getThreadPool())
    client = RegistryClient.connect(reactor, url, threads)
    readiness = Readiness(reactor)
    readiness.add("upstream", upstream_problem(client))
    assert (await readiness.problems())["upstream"] is not None
    assert len(connections) == 2
    await client.close()
    await maybeDeferred(port.stopListening)


@pytest_twisted.ensureDeferred
async def test_each_kind_of_upstream_is_checked(tmp_path: Path) -> None:
    threads = Threads(reactor, reactor.getThreadPool())
    assert await upstream_problem(LayoutUpstream(tmp_path, threads))() is None
    client = RegistryClient.connect(reactor, "http://127.0.0.1:1", threads)
    readiness = Readiness(reactor)
    readiness.add("upstream", upstream_problem(client))
    report = (await readiness.problems())["upstream"]
    assert report is not None
    assert "cannot connect" in report
    await client.close()
