"""The operators' endpoint: routes, access, errors, and streams of events."""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread

from obdelta.concurrency.limits import Limit
from obdelta.concurrency.threads import Threads
from obdelta.errors import UpstreamUnavailable
from obdelta.net.client_address import ForwardedClients
from obdelta.web.operators.app import OperatorApp
from obdelta.web.operators.login import ActionGuard
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json, text
from obdelta.web.operators.sse import Events, EventStream
from obdelta.web.request import make_site
from tests.support.logs import logged
from tests.support.web import reactor, serving_site

KEY = b"k" * 32
GUARD = ActionGuard(KEY, Threads(reactor, reactor.getThreadPool()), reactor)
LOGIN = {"authorization": f"Bearer {KEY.hex()}"}


async def echo(call: Call) -> Answer:
    return as_json({"parameters": dict(call.parameters), "size": call.argument("size")})


async def echo_body(call: Call) -> Answer:
    return as_json(call.json(), 202)


async def gone(call: Call) -> Answer:
    raise NotFound("no such pair")


async def upstream_trouble(call: Call) -> Answer:
    raise UpstreamUnavailable("refused")


async def defect(call: Call) -> Answer:
    raise RuntimeError("secret")


def make_app() -> OperatorApp:
    operator_app = OperatorApp(GUARD, {"delta.example.com"})
    operator_app.routes.add("GET", "/healthz", gone)
    operator_app.routes.add("GET", "/pairs/{pair}/files/{path...}", echo)
    operator_app.routes.add("POST", "/api/v1/gc", echo_body)
    operator_app.routes.add("GET", "/api/v1/gone", gone)
    operator_app.routes.add("GET", "/api/v1/upstream", upstream_trouble)
    operator_app.routes.add("GET", "/defect", defect)
    return operator_app


Ask = Callable[..., "Deferred[tuple[int, dict[str, str], bytes]]"]


@asynccontextmanager
async def asking(operator_app: OperatorApp) -> AsyncIterator[Ask]:
    """Yields ``ask(method, path, body=None, **headers)``, which returns status, headers in lower
    case, body.
    """
    async with serving_site(
        make_site(operator_app, reactor, clients=ForwardedClients(None))
    ) as url:
        port = int(url.rpartition(":")[2])

        def blocking(
            method: str, path: str, body: bytes | None, headers: dict[str, str]
        ) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.request(
                    method, path, body, {name.replace("_", "-"): headers[name] for name in headers}
                )
                answer = connection.getresponse()
                return (
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    answer.read(),
                )
            finally:
                connection.close()

        def ask(
            method: str, path: str, body: bytes | None = None, **headers: str
        ) -> Deferred[tuple[int, dict[str, str], bytes]]:
            return deferToThread(blocking, method, path, body, headers)

        yield ask


JSON = {**LOGIN, "content_type": "application/json; charset=utf-8"}


@pytest_twisted.ensureDeferred
async def test_routes_get_their_parameters() -> None:
    async with asking(make_app()) as ask:
        status, headers, body = await ask("GET", "/pairs/abc/files/usr%2Flib/a%20b?size=3&x")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body) == {
            "parameters": {"pair": "abc", "path": "usr/lib/a b"},
            "size": "3",
        }
        status, headers, body = await ask("HEAD", "/pairs/abc/files/x")
        assert (status, int(headers["content-length"]) > 0, body) == (200, True, b"")


@pytest_twisted.ensureDeferred
async def test_unknown_routes_are_errors() -> None:
    async with asking(make_app()) as ask:
        status, headers, body = await ask("GET", "/pairs/abc")
        assert (status, body) == (
            404,
            f"there is nothing at this path (request {headers['x-request-id']})\n".encode(),
        )
        assert headers["content-type"] == "text/plain; charset=utf-8"
        status, headers, body = await ask("GET", "/api/v1/gone")
        error = {"type": "NotFound", "message": "no such pair", "request": headers["x-request-id"]}
        assert (status, json.loads(body)) == (404, {"error": error})
        status, headers, body = await ask("DELETE", "/api/v1/gc")
        assert (status, headers["allow"], json.loads(body)["error"]["type"]) == (
            405,
            "POST",
            "MethodNotAllowed",
        )
        status, headers, body = await ask("POST", "/pairs/a/files/b")
        assert (status, headers["allow"], body) == (
            405,
            "GET, HEAD",
            f"only GET, HEAD are served here (request {headers['x-request-id']})\n".encode(),
        )
        assert (await ask("GET", "/pairs/%ff/files/x"))[0] == 400


@pytest_twisted.ensureDeferred
async def test_errors_have_their_statuses() -> None:
    async with asking(make_app()) as ask:
        status, headers, body = await ask("GET", "/api/v1/upstream")
        error = {
            "type": "UpstreamUnavailable",
            "message": "upstream registry: refused",
            "request": headers["x-request-id"],
        }
        assert (status, json.loads(body)) == (502, {"error": error})
        with logged("critical") as lines:
            status, _, body = await ask("GET", "/defect", accept="application/json")
        assert (status, len(lines), b"secret" in body) == (500, 1, False)
        assert json.loads(body)["error"]["type"] == "Unexpected"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"a": 1}', JSON, 202),
        (b'{"a": 1}', LOGIN, 400),
        (b'{"a": 1}', {**LOGIN, "content_type": "text/plain"}, 400),
        (b"", JSON, 400),
        (b"[]", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"\xff", JSON, 400),
        (b" " * (1 << 20) + b"{}", JSON, 413),
    ],
)
@pytest_twisted.ensureDeferred
async def test_bodies_are_json_objects_and_bounded(
    body: bytes, headers: dict[str, str], status: int
) -> None:
    async with asking(make_app()) as ask:
        assert (await ask("POST", "/api/v1/gc", body, **headers))[0] == status


@pytest_twisted.ensureDeferred
async def test_missing_and_repeated_arguments_are_errors() -> None:
    async def needy(call: Call) -> Answer:
        return text(call.needed("src"))

    operator_app = OperatorApp(GUARD)
    operator_app.routes.add("GET", "/", needy)
    async with asking(operator_app) as ask:
        assert (await ask("GET", "/?src=a"))[2] == b"a\n"
        for query in ["", "?src=", "?src=a&src=b", "?" + "&".join(["a=1"] * 60)]:
            assert (await ask("GET", "/" + query))[0] == 400, query


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9100", 200),
        ("[::1]:9100", 200),
        ("[fe80::1]", 200),
        ("localhost", 200),
        ("delta.localhost:9100", 200),
        ("obdelta:9100", 200),
        ("DELTA.example.com:9100", 200),
        ("delta.example.com.", 200),
        ("attacker.example.com:9100", 403),
        ("127.0.0.1.attacker.example.com", 403),
        ("delta.example.com.attacker.net", 403),
        ("localhost@attacker.example.com", 400),
        ("", 400),
    ],
)
@pytest_twisted.ensureDeferred
async def test_requests_for_other_hosts_are_refused(host: str, status: int) -> None:
    async with asking(make_app()) as ask:
        assert (await ask("GET", "/pairs/a/files/b", host=host))[0] == status
        # A Host field with a user part is malformed (RFC 9112), whatever is asked.
        assert (await ask("GET", "/healthz", host=host))[0] == (400 if "@" in host else 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"origin": "http://localhost:9100"}, 202),
        ({"origin": "https://localhost:9100", "sec_fetch_site": "same-origin"}, 202),
        ({"origin": "http://localhost:8080"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://attacker.example.com"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
    ],
)
@pytest_twisted.ensureDeferred
async def test_pages_of_other_sites_cannot_act(headers: dict[str, str], status: int) -> None:
    async with asking(make_app()) as ask:
        assert (await ask("POST", "/api/v1/gc", b"{}", host="localhost:9100", **JSON, **headers))[
            0
        ] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}, 200),
        ({"sec_fetch_site": "none", "sec_fetch_dest": "document"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "iframe"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_dest": "empty"}, 403),
        ({"sec_fetch_site": "same-site", "sec_fetch_dest": "image"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
    ],
)
@pytest_twisted.ensureDeferred
async def test_pages_of_other_sites_may_link_but_load_nothing(
    headers: dict[str, str], status: int
) -> None:
    async with asking(make_app()) as ask:
        assert (await ask("GET", "/pairs/a/files/b", host="localhost:9100", **headers))[0] == status


@pytest_twisted.ensureDeferred
async def test_whatever_is_not_read_needs_a_login() -> None:
    users = []

    async def change(call: Call) -> Answer:
        users.append(call.user)
        return text("done")

    app = OperatorApp(GUARD)
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        app.routes.add(method, "/thing", change)
    app.routes.form("/form", change)
    async with asking(app) as ask:
        for method, path in [
            *((method, "/thing") for method in ("POST", "PUT", "PATCH", "DELETE")),
            ("POST", "/form"),
        ]:
            assert (await ask(method, path))[0] == 403, method
            wrong = {"authorization": f"Bearer {'0' * 64}"}
            assert (await ask(method, path, **wrong))[0] == 401, method
            assert (await ask(method, path, **LOGIN))[0] == 200, method
    assert users == ["local"] * 5


@pytest_twisted.ensureDeferred
async def test_no_answer_is_framed_guessed_or_stored() -> None:
    async with asking(make_app()) as ask:
        for path in ("/pairs/a/files/b", "/nothing", "/api/v1/gone", "/defect", "/healthz"):
            with logged("critical"):
                _, headers, _ = await ask("GET", path)
            assert "frame-ancestors 'none'" in headers["content-security-policy"], path
            assert headers["x-content-type-options"] == "nosniff", path
            assert headers["cross-origin-resource-policy"] == "same-origin", path
            assert headers["cache-control"] == "no-store", path


def test_a_route_is_added_once() -> None:
    routes = Routes()
    routes.add("GET", "/a", echo)
    routes.add("POST", "/a", echo)
    with pytest.raises(ValueError, match="GET /a"):
        routes.add("GET", "/a", echo)


class Reader:
    """A client of an endpoint, without a socket: it keeps its bytes, and pauses when the test says
    so.
    """

    def __init__(self, operator_app: OperatorApp, clock: Clock, request: str) -> None:
        self.transport = StringTransport()
        self.channel: Protocol = make_site(  # type: ignore[no-untyped-call] # Twisted's
            operator_app, clock, clients=ForwardedClients(None)
        ).buildProtocol(None)
        self.channel.makeConnection(self.transport)
        login = f"Authorization: {LOGIN['authorization']}"
        self.channel.dataReceived(
            f"{request} HTTP/1.1\r\nHost: localhost\r\n{login}\r\n\r\n".encode()
        )

    def got(self) -> str:
        value: bytes = self.transport.value()
        self.transport.clear()
        return value.decode()

    def cut(self) -> bool:
        return bool(self.transport.disconnecting)

    def producer(self) -> IPushProducer:
        return cast(IPushProducer, self.transport.producer)

    def leave(self) -> None:
        self.channel.connectionLost()


class Studio:
    """Sends to all listeners."""

    def __init__(self, clock: Clock) -> None:
        self.streams: list[EventStream] = []
        self.operator_app, self._clock, self._readers = (
            OperatorApp(GUARD),
            clock,
            Limit(2, "readers"),
        )
        self.operator_app.routes.add("GET", "/events", self.events)

    async def events(self, call: Call) -> Answer:
        return Events(self.attach, self._clock, self._readers)

    def attach(self, stream: EventStream) -> Callable[[], None]:
        self.streams.append(stream)
        return lambda: self.streams.remove(stream)


def test_events_reach_their_reader_until_it_leaves() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    assert "text/event-stream" in reader.got()
    studio.streams[0].send("progress", "one\ntwo\rthree")
    assert "event: progress\ndata: one\ndata: two\ndata: three\n\n" in reader.got()
    clock.advance(15)
    assert ":\n\n" in reader.got()
    reader.leave()
    assert studio.streams == []
    assert not clock.getDelayedCalls()


def test_a_slow_reader_gets_the_newest_of_each_kind() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    reader.got()
    reader.producer().pauseProducing()
    for number in range(1000):
        studio.streams[0].send("progress", str(number))
    studio.streams[0].send("pair", "ready")
    clock.advance(60)
    assert reader.got() == ""
    reader.producer().resumeProducing()
    got = reader.got()
    assert got.count("data: ") == 2
    assert got.index("data: 999") < got.index("data: ready")
    reader.leave()


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    reader.producer().pauseProducing()
    clock.pump([15] * 7)
    assert not reader.cut()
    reader.producer().resumeProducing()
    clock.pump([15] * 20)
    assert not reader.cut()
    reader.producer().pauseProducing()
    clock.pump([15] * 9)
    assert reader.cut()
    reader.leave()
    assert studio.streams == []


def test_a_stream_may_end() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    (stream,) = studio.streams
    stream.send("result", "42")
    stream.end()
    assert studio.streams == []
    assert reader.got().endswith("0\r\n\r\n")
    stream.send("more", "43")
    stream.end()
    assert reader.got() == ""
    reader.leave()


def test_the_number_of_readers_is_bounded() -> None:
    clock = Clock()
    studio = Studio(clock)
    readers = [Reader(studio.operator_app, clock, "GET /events") for _ in range(3)]
    assert ["429 Too Many" in reader.got() for reader in readers] == [False, False, True]
    readers[0].leave()
    assert "200 OK" in Reader(studio.operator_app, clock, "GET /events").got()


@pytest.mark.parametrize(("method", "called_off"), [("GET", True), ("POST", False)])
def test_a_client_that_leaves_cancels_only_reads(method: str, called_off: bool) -> None:
    clock, waiting, ended = Clock(), Deferred[None](), []

    async def slow(call: Call) -> Answer:
        try:
            await waiting
        except CancelledError:
            ended.append("called off")
            raise
        ended.append("done")
        return text("done")

    operator_app = OperatorApp(GUARD)
    operator_app.routes.add(method, "/slow", slow)
    with logged("warn", "error", "critical") as lines:
        reader = Reader(operator_app, clock, f"{method} /slow")
        reader.leave()
        if not called_off:
            waiting.callback(None)
    assert ended == ["called off" if called_off else "done"]
    assert lines == []
