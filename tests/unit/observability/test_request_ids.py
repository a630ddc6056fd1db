"""Request IDs: who may set them, and where they go."""

from __future__ import annotations

import os
import sys
from functools import partial

import pytest
import pytest_twisted
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, LogLevel
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Request

from obdelta.concurrency.tasks import Threads
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.observability.logging import (
    accepted_request_id,
    begin_request,
    current_request,
    with_request,
    within_request,
)
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.registry.client import RegistryClient
from obdelta.registry.upstream import ProxiedRequest
from obdelta.web.request import make_site
from tests.support.logs import Written
from tests.support.web import reactor, serving


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (b"0af7651916cd43dd8448eb211c80319c", True),
        (b"a/b=c:1.2~+@-_", True),
        (b"", False),
        (b"a b", False),
        (b"x" * 65, False),
        (b"a\xff", False),
        (b"a\nb", False),
        (None, False),
    ],
)
def test_request_ids_from_outside_are_checked(given: bytes | None, name: bool) -> None:
    assert accepted_request_id(given) == (given.decode() if name and given is not None else None)


class Naming(Resource):
    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)

    def render_GET(self, request: Request) -> bytes:
        return current_request().encode()


@pytest.mark.parametrize(
    ("clients", "peer", "taken"),
    [
        (ForwardedClients(TrustedProxies(("10.0.0.0/8",))), "10.1.2.3", True),
        (ForwardedClients(TrustedProxies(("10.0.0.0/8",))), "192.0.2.7", False),
        (ForwardedClients(None), "10.1.2.3", False),
    ],
)
def test_only_a_trusted_proxy_may_set_request_ids(
    clients: ForwardedClients, peer: str, taken: bool
) -> None:
    channel = make_site(Naming(), Clock(), clients=clients).buildProtocol(  # type: ignore[no-untyped-call] # Twisted's
        IPv4Address("TCP", peer, 1)
    )
    transport = StringTransport(peerAddress=IPv4Address("TCP", peer, 1))
    channel.makeConnection(transport)
    channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n")
    head, _, body = transport.value().decode().partition("\r\n\r\n")
    (name,) = [
        line.partition(": ")[2]
        for line in head.splitlines()
        if line.lower().startswith("x-request-id: ")
    ]
    assert body == name
    assert (name == "mine") == taken
    assert taken or len(name) == 16


@pytest_twisted.ensureDeferred
async def test_parallel_requests_keep_their_ids() -> None:
    gates: list[Deferred[None]] = [Deferred(), Deferred()]
    seen: list[str] = []

    async def work(gate: Deferred[None]) -> None:
        await gate
        seen.append(current_request())
        await ensureDeferred(inner())

    async def inner() -> None:
        seen.append(current_request())

    def begin(gate: Deferred[None]) -> None:
        ensureDeferred(work(gate))

    for name, gate in zip(("one", "two"), gates, strict=True):
        within_request(name, partial(begin, gate))
    for gate in reversed(gates):
        gate.callback(None)
    assert seen == ["two", "two", "one", "one"]
    assert current_request() == ""


@pytest_twisted.ensureDeferred
async def test_workers_get_the_request_id_with_their_jobs() -> None:
    echo = (
        "import sys, json\nfor line in sys.stdin:\n    print(json.dumps({'result':"
        " json.loads(line)}), flush=True)\n"
    )
    pool = WorkerPool(reactor, 1, command=(sys.executable, "-c", echo))

    async def ask() -> object:
        begin_request("abc")
        return await pool.run({"task": "x"}, seconds=30)

    assert await ensureDeferred(ask()) == {"task": "x", "request": "abc", "parent": os.getpid()}
    assert await pool.run({"task": "x"}, seconds=30) == {
        "task": "x",
        "request": "",
        "parent": os.getpid(),
    }
    await pool.close()


class Recording(Resource):
    """Replaces a registry: it records the received requests, which real ones do not show."""

    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)
        self.names: list[bytes | None] = []

    def render_GET(self, request: Request) -> bytes:
        self.names.append(request.getHeader(b"x-request-id"))
        request.setHeader(b"x-request-id", b"theirs")
        return b"{}"


@pytest_twisted.ensureDeferred
async def test_the_upstream_gets_the_request_id() -> None:
    recording = Recording()
    async with serving(recording) as url:
        client = RegistryClient.connect(reactor, url, Threads(reactor, reactor.getThreadPool()))

        async def ask() -> None:
            answer = await client.relay(
                ProxiedRequest(b"GET", "/v2/", Headers(), Credentials.anonymous())
            )
            answer.cancel()

        async def named() -> None:
            begin_request("abc")
            await ask()

        await ensureDeferred(named())
        await ask()
        await client.close()
    assert recording.names == [b"abc", None]


def test_events_of_another_process_keep_their_request_id() -> None:
    parsed: list[LogEvent] = []
    within_request("abc", lambda: parsed.append(with_request({"log_format": "x"})))
    written = Written()
    written._publisher(
        {**parsed[0], "log_level": LogLevel.info, "log_namespace": "obdelta.x", "log_time": 0.0}
    )
    assert written.lines[0].endswith("x request=abc")
