"""Answers that mean "ask again" are held: by the clock, under load, and when clients leave."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.http import Request

from obdelta.concurrency.limits import Limit
from obdelta.errors import BadRequest, QueueFull, UpstreamBusy
from obdelta.net.client_address import ForwardedClients
from obdelta.net.http_server import BoundedSite
from obdelta.oci import Reference
from obdelta.web.devices.access.admission import Admission, OpenAccess
from obdelta.web.devices.app import DeviceResource
from obdelta.web.devices.retries import REFUSAL_LIMIT, HeldAnswers, RefusedPairs
from obdelta.web.devices.v3 import DeltaRequest
from obdelta.web.request import IdentifiedRequest
from obdelta.web.request_traces import RequestTraces
from tests.support.supervisor import Act, Supervisor
from tests.support.waiting import eventually
from tests.support.web import reactor, serving_site

HOLD = 45.0


class RequestDouble:
    """A request with the parts that are needed here."""

    def __init__(self) -> None:
        self._finish: list[Deferred[None]] = []

    def notifyFinish(self) -> Deferred[None]:
        self._finish.append(Deferred())
        return self._finish[-1]

    def end(self) -> None:
        for finish in self._finish:
            finish.callback(None)


def held_request(held: HeldAnswers, client: str = "device") -> tuple[Deferred[None], RequestDouble]:
    held_one = RequestDouble()
    held.begin(cast(Request, held_one))
    return ensureDeferred(held.wait(cast(Request, held_one), client)), held_one


class LoopingSupervisor:
    """A supervisor that is refused each time, on a clock that the test moves."""

    def __init__(self, held: HeldAnswers, clock: Clock, number: int) -> None:
        self.asks = 0
        self._held, self._clock = held, clock
        self._supervisor = Supervisor(chance=random.Random(number))

    def ask(self) -> None:
        self.asks += 1
        answer, held_one = held_request(self._held)

        def answered(_: object) -> None:
            held_one.end()
            reaction = self._supervisor.answered(504)
            assert reaction.act is Act.ASK
            self._clock.callLater(reaction.seconds, self.ask)

        answer.addCallback(answered)


def asks_per_second(held: HeldAnswers, clock: Clock, count: int, seconds: int) -> float:
    supervisors = [LoopingSupervisor(held, clock, number) for number in range(count)]
    for supervisor in supervisors:
        supervisor.ask()
    for _ in range(seconds * 2):
        clock.advance(0.5)
    return sum(supervisor.asks for supervisor in supervisors) / seconds


def test_a_thousand_supervisors_at_a_full_queue_ask_less_than_thirty_times_a_second() -> None:
    clock = Clock()
    assert asks_per_second(HeldAnswers(clock, HOLD), clock, 1000, 150) < 30


def test_holding_times_differ_by_a_tenth_so_that_a_herd_spreads() -> None:
    held = HeldAnswers(Clock(), HOLD)
    requests = [cast(Request, RequestDouble()) for _ in range(200)]
    for request in requests:
        held.begin(request)
    times = sorted(held.seconds_left(request) for request in requests)
    assert HOLD * 0.9 <= times[0] < HOLD * 0.95 and HOLD * 1.05 < times[-1] <= HOLD * 1.1


def test_above_the_limit_the_oldest_request_is_answered() -> None:
    clock = Clock()
    held = HeldAnswers(clock, HOLD, 2)
    first, second, third = (held_request(held)[0] for _ in range(3))
    assert (first.called, second.called, third.called) == (True, False, False)
    assert held.count == 2
    clock.advance(HOLD * 1.11)
    assert second.called and third.called
    assert held.count == 0 and clock.getDelayedCalls() == []


def test_a_flood_of_one_client_shortens_only_its_own_answers() -> None:
    clock = Clock()
    held = HeldAnswers(clock, HOLD, 100, uniform=lambda low, most: 1.0)
    honest = [held_request(held, f"device {number}")[0] for number in range(20)]
    clock.advance(1)
    hostile = [held_request(held, "hostile")[0] for _ in range(1000)]
    assert not any(answer.called for answer in honest)
    assert [answer.called for answer in hostile] == [True] * 920 + [False] * 80
    assert held.count == 100
    clock.advance(HOLD - 1.5)
    assert not any(answer.called for answer in honest)
    clock.advance(0.5)
    assert all(answer.called for answer in honest)


def test_a_client_that_leaves_frees_its_place() -> None:
    clock = Clock()
    held = HeldAnswers(clock, HOLD, 1)
    leaves, _ = held_request(held)
    leaves.addErrback(lambda failure: failure.trap(CancelledError) and None)
    leaves.cancel()
    assert held.count == 0 and clock.getDelayedCalls() == []
    stays, _ = held_request(held)
    assert not stays.called


def test_a_stop_answers_all_and_holds_none() -> None:
    held = HeldAnswers(Clock(), HOLD)
    before = [held_request(held)[0] for _ in range(3)]
    held.stop()
    after, _ = held_request(held)
    assert all(one.called for one in (*before, after))


def test_a_pair_is_refused_for_up_to_15_minutes() -> None:
    clock = Clock()
    refused = RefusedPairs(clock)
    for _ in range(20):
        assert not refused.refused("device", "v3", "a", "b")
        clock.advance(REFUSAL_LIMIT / 20)
    assert not refused.refused("device", "v3", "a", "b")
    clock.advance(1)
    assert refused.refused("device", "v3", "a", "b") and not refused.refused(
        "device", "v3", "a", "c"
    )
    refused.accepted("v3", "a", "b")
    assert not refused.refused("device", "v3", "a", "b")
    # A client that comes back after a while starts with a new quarter of an hour.
    clock.advance(REFUSAL_LIMIT + 1)
    assert not refused.refused("device", "v3", "a", "b")


def test_one_client_flushes_only_its_own_refused_pairs() -> None:
    clock = Clock()
    refused = RefusedPairs(clock)
    honest = [("v3", f"base {number}", "target") for number in range(20)]
    for _ in range(4):
        for number, pair in enumerate(honest):
            assert not refused.refused(f"device {number}", *pair)
        for number in range(12_000):
            refused.refused("hostile", "v3", f"base {number}", "hostile")
        clock.advance(REFUSAL_LIMIT / 4)
    clock.advance(1)
    assert all(refused.refused("device", *pair) for pair in honest)
    assert len(refused._times) == len(refused._lines) <= 20 + 256


def test_refused_pairs_take_bounded_memory_from_many_clients() -> None:
    clock = Clock()
    refused = RefusedPairs(clock)
    assert not refused.refused("device", "v3", "a", "b")
    for number in range(12_000):
        refused.refused(f"hostile {number % 100}", "v3", f"base {number}", "hostile")
    assert len(refused._times) == len(refused._lines) == 10_000
    clock.advance(60)
    assert not refused.refused("device", "v3", "a", "b")
    assert refused._times["v3", "a", "b"] == (0.0, 60.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.example/v2/a", "v2/a:latest"),
        ("X.example/v2/a:1", "v2/a:1"),
        (f"v2/a@sha256:{'a' * 64}", f"x.example/v2/a:1@sha256:{'a' * 64}"),
    ],
)
def test_spellings_of_one_image_are_one_name(one: str, other: str) -> None:
    first, second = (
        DeltaRequest(Reference.parse(text), Reference.parse(text), text, wait=False).names()
        for text in (one, other)
    )
    assert first == second


# -- over HTTP ---------------------------------------------------------------------------------


class Refusing(DeviceResource):
    def __init__(self, held: HeldAnswers, error: Callable[[], Exception]) -> None:
        admission = Admission(OpenAccess(), Limit(0, "requests"), ForwardedClients(None))
        super().__init__(held, admission, RequestTraces(time.time))
        self._error = error

    async def serve(self, request: Any, path: str) -> None:
        raise self._error()


class Raw(Protocol):
    """Keeps received bytes. ``lost`` fires at the end."""

    def __init__(self) -> None:
        self.got = b""
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost.callback(None)


async def ask_raw(url: str, path: str) -> Raw:
    port = int(url.rpartition(":")[2])
    raw: Raw = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Raw())
    assert raw.transport is not None
    raw.transport.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return raw


async def until_held(held: HeldAnswers, count: int) -> None:
    await eventually(f"{count} are held", lambda: held.count == count)


@pytest.mark.parametrize(
    ("error", "status"), [(lambda: QueueFull(3), b" 504 "), (lambda: UpstreamBusy(5), b" 502 ")]
)
@pytest_twisted.ensureDeferred
async def test_only_transient_errors_of_connected_clients_are_held(
    error: Callable[[], Exception], status: bytes
) -> None:
    clock = Clock()
    held = HeldAnswers(clock, HOLD)
    site = BoundedSite(Refusing(held, error), IdentifiedRequest, reactor=reactor)
    async with serving_site(site) as url:
        leaves, stays = [await ask_raw(url, f"/api/v{version}/delta") for version in (2, 3)]
        await until_held(held, 2)
        assert leaves.transport is not None
        cast(Any, leaves.transport).abortConnection()
        await until_held(held, 1)
        assert stays.got == b""
        clock.advance(HOLD * 1.11)
        await stays.lost
        assert status in stays.got and b"\r\nRetry-After: " in stays.got


@pytest_twisted.ensureDeferred
async def test_a_final_refusal_is_answered_at_once() -> None:
    held = HeldAnswers(Clock(), HOLD)
    site = BoundedSite(Refusing(held, lambda: BadRequest("no")), IdentifiedRequest, reactor=reactor)
    async with serving_site(site) as url:
        held_one = await ask_raw(url, "/api/v3/delta")
        await held_one.lost
        assert b" 400 " in held_one.got
