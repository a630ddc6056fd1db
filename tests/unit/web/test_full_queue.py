"""Supervisors at a full queue and at limits: they retry slowly, and get a full pull at last."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.task import Clock
from twisted.web.test.requesthelper import DummyRequest

from bench.registry import serving
from obdelta.builds.types import Answer, FullPull
from obdelta.concurrency.limits import Limit
from obdelta.errors import (
    EngineUnavailable,
    ObdeltaError,
    QueueFull,
    StillBuilding,
    StoreFull,
    TooManyRequests,
    UpstreamBusy,
    UpstreamUnavailable,
)
from obdelta.net.client_address import ForwardedClients
from obdelta.oci import Reference
from obdelta.registry import OwnCredentials
from obdelta.web.devices.access.admission import Admission, OpenAccess
from obdelta.web.devices.retries import HeldAnswers, RefusedPairs
from obdelta.web.devices.v3 import DeltaApi
from tests.support.fault_fleet import builds, make_fleet, repository
from tests.support.held_rsync import HeldRsync
from tests.support.processes import connection_to, until
from tests.support.processes import serving as serving_processes
from tests.support.server import RunningServer, running_server
from tests.support.supervisor import Act, Fleet, Reaction, Supervisor

HOLD = 45.0


def question(server: RunningServer, number: int, version: int = 2) -> str:
    base, target = (f"{server.host}/{repository(image)}" for image in (number, number + 1))
    return f"/api/v{version}/delta?src={base}&dest={target}"


def states(server: RunningServer) -> list[str]:
    return [build["state"] for build in builds(server.operator_url)]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_supervisors_at_a_full_queue_retry_slowly(tmp_path: Path, processes: str) -> None:
    """Supervisors run ten times faster than real ones: each sends a request in 4.5 seconds instead
    of ten a second.
    """
    rsync = HeldRsync(tmp_path / "bin")
    options: dict[str, Any] = {
        "max_builds": "1",
        "constants": {"obdelta.builds.queue.MAX_WAITING": 1},
        "v2_streaming": "never",
        "request_timeout": "4.5",
        "max_delta_ratio": "10",
    }
    options |= {"max_connections": "0", "max_requests": "0", "processes": processes}
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 4)
        with running_server(
            tmp_path / "state", upstream=registry, environment=rsync.environment, **options
        ) as server:
            fleet = Fleet(server.url, speed=10)
            paths = (
                [(question(server, 0), "")]
                + [(question(server, 1), "")]
                + [(question(server, 2), "")] * 48
            )
            statuses = fleet.run(90, paths)
            assert set(statuses) == {504}
            # 50 in 9 seconds: two answers each at most, since the third is held until the end.
            assert statuses[504] <= 100
            until("those that left are forgotten", lambda: "queued" in states(server))
            rsync.go_on()
            rsync.go_on()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_limits_of_connections_and_requests_are_no_429_to_supervisors(
    tmp_path: Path, processes: str
) -> None:
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        options: dict[str, Any] = {
            "request_timeout": "1",
            "max_connections": "1",
            "processes": processes,
            "proxy_from": "192.0.2.1",
        }
        with running_server(tmp_path / "state", upstream=registry, **options) as server:
            pid = serving_processes(server, 1)[0] if processes == "2" else server.process.pid
            first, second = (connection_to(server, pid) for _ in range(2))
            for path, status in (
                (question(server, 0), 504),
                ("/api/v2/delta/download?full-pull=yes", 504),
            ):
                second.request("GET", path)
                answer = second.getresponse()
                assert (answer.status, b"too many connections" in answer.read()) == (status, True)
            second.request("GET", "/v2/")
            assert second.getresponse().status == 429
            first.request("GET", question(server, 0, 3) + "&wait=true")
            assert first.getresponse().status == 200
            first.close()
            second.close()
            assert "Traceback" not in server.log


def test_a_limit_of_requests_is_held_too(tmp_path: Path) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        with running_server(
            tmp_path / "state",
            upstream=registry,
            environment=rsync.environment,
            max_requests="1",
            request_timeout="3",
        ) as server:
            fleet = Fleet(server.url, speed=10)
            statuses = fleet.run(45, [(question(server, 0), "")] * 3)
            assert set(statuses) == {504} and statuses[504] <= 6
            rsync.go_on()


def test_the_double_does_what_a_supervisor_was_measured_to_do() -> None:
    """Section 1 of the measurements on supervisor v19.0.5: intervals, and what ends in a full
    pull.
    """
    for status in (400, 403, 404, 429):
        assert Supervisor().answered(status) == Reaction(Act.FULL_PULL)
    backed_off = Supervisor()
    assert [backed_off.answered(500).seconds for _ in range(3)] == [1.2, 2.2, 4.2]
    away = Supervisor()
    assert [away.answered(None).seconds for _ in range(6)] == [1, 2, 4, 8, 16, 16]
    for status in (502, 504):
        assert 0.2 <= Supervisor().answered(status).seconds <= 1.0
    assert Supervisor().answered(200) == Reaction(Act.PULL) == Supervisor(v2=True).answered(300)
    assert Supervisor(v2=True).answered(429).act is Act.ASK
    pulls = Supervisor()
    assert [pulls.pulled(None).act for _ in range(3)] == [Act.ASK, Act.ASK, Act.FULL_PULL]
    assert [Supervisor().pulled(status).act for status in (401, 403, 404)] == [Act.ASK] * 3


class Overloaded:
    """Accepts no build; tests/unit/builds/test_service.py tests the real service."""

    def __init__(self) -> None:
        self.error: ObdeltaError = QueueFull(1000)
        self.categories: list[str] = []

    async def delta(self, *arguments: object, **keywords: object) -> Answer:
        raise self.error

    async def refuse(self, kind: str, base: str, target: str, why: str, category: str) -> FullPull:
        self.categories.append(category)
        return FullPull(why, category)


class Direct:
    """Treats every image as an ordinary one."""

    async def image_behind(self, reference: Reference, credentials: object) -> Reference:
        return reference


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (QueueFull(1000), True),
        (StoreFull("the disk is full"), True),
        (EngineUnavailable("it is silent"), True),
        (UpstreamBusy(5), True),
        (TooManyRequests("64 at a time"), True),
        (UpstreamUnavailable("it answered 500"), False),
        (StillBuilding(), False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_pair_that_is_refused_for_load_for_long_gets_a_full_pull(
    error: ObdeltaError, ends: bool
) -> None:
    clock, overloaded = Clock(), Overloaded()
    overloaded.error = error

    async def record(*_: object) -> None:
        pass

    api = DeltaApi(
        cast(Any, overloaded),
        Admission(OpenAccess(), Limit(0, "requests"), ForwardedClients(None)),
        OwnCredentials.none(),
        registry_hosts=frozenset({"x.example"}),
        public_host="x.example",
        own_credentials=None,
        tags=cast(Any, Direct()),
        held=HeldAnswers(clock, HOLD),
        refused=RefusedPairs(clock),
        record_update=record,
        manifests=True,
    )

    async def ask() -> bytes:
        request = DummyRequest([b""])
        request.args = {b"src": [b"x.example/a"], b"dest": [b"x.example/b"]}
        return await api.answer_v3(cast(Any, request))

    for _ in range(20):
        with pytest.raises(type(error)):
            await ask()
        clock.advance(45.1)
    if ends:
        assert await ask() == b'{"name": "x.example/b"}'
        assert overloaded.categories == ["overload"]
    else:
        with pytest.raises(type(error)):
            await ask()
