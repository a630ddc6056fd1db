"""The log: text and JSON, levels by area, and the request's ID in all work for it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, Logger, LogLevel, LogPublisher
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Request

from obdelta import settings
from obdelta.concurrency.threads import Threads
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.observability import request_id as naming
from obdelta.observability.logging import observer, with_request
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.registry.client import RegistryClient
from obdelta.registry.upstream import ProxiedRequest
from obdelta.web.request import make_site
from tests.server.test_v3 import update
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, command, free_port, running_server
from tests.support.web import reactor, serving


class Written:
    """Returns what our observer writes."""

    def __init__(self, how: str = "text", **levels: str) -> None:
        self.out, self._publisher = io.StringIO(), LogPublisher()
        given = {name.replace("_", "."): level for name, level in levels.items() if name != "all_"}
        self._publisher.addObserver(
            observer(how, {"": levels.get("all_", "info"), **given}, self.out)
        )

    def log(self, namespace: str = "obdelta.web.devices.app") -> Logger:
        return Logger(namespace, observer=self._publisher)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def test_a_text_line_names_its_request() -> None:
    written = Written()
    written.log().info("hello {who}", who="world")
    naming.within("abc", lambda: written.log().info("hello {who}", who="you"))
    first, second = written.lines
    assert first.endswith("[obdelta.web.devices.app#info] hello world")
    assert second.endswith("[obdelta.web.devices.app#info] hello you request=abc")


def test_twisted_s_notices_of_ports_are_left_out() -> None:
    """The server logs its addresses itself."""
    written = Written()
    legacy = written.log("log_legacy")
    for notice in (
        "QuietSite starting on 8080",
        "QuietSite (TLS) starting on 8080",
        "QuietSite (TLS) (ProxiedFactory) starting on 8080",
        "QuietSite starting on '/run/obdelta/socket'",
        "(TCP Port 8080 Closed)",
        "(UNIX Port /run/obdelta/socket Closed)",
    ):
        legacy.info("{text}", text=notice)
    legacy.info("{text}", text="a plug-in starting on 8080 failed")
    written.log().info("{text}", text="QuietSite starting on 8080")
    assert len(written.lines) == 2


FORGED = "2026-01-01T00:00:00+0000 [x#info] forged"
HOSTILE = [
    (f"one\n{FORGED}", rf"one\n{FORGED}"),
    (f"one\r{FORGED}", rf"one\r{FORGED}"),
    (f"one\u2028{FORGED}\x85{FORGED}", rf"one\u2028{FORGED}\x85{FORGED}"),
    ("\x1b[2J\x1b]0;title\x07\x9b31m", r"\x1b[2J\x1b]0;title\x07\x9b31m"),
    ("\u202egnp.exe\u2066\ufeff", r"\u202egnp.exe\u2066\ufeff"),
    ("\ud800\x00\t\x7f", r"\ud800\x00\t\x7f"),
    ("Grüße, 世界", "Grüße, 世界"),
]


@pytest.mark.parametrize(("given", "shown"), HOSTILE)
def test_untrusted_text_is_escaped(given: str, shown: str) -> None:
    written = Written()
    naming.within("abc", lambda: written.log().warn("{reason}", reason=given))
    (line,) = written.out.getvalue().split("\n")[:-1]
    assert line.endswith(f"[obdelta.web.devices.app#warn] {shown} request=abc")
    assert line.isprintable()


def test_a_traceback_is_indented_and_its_message_escaped() -> None:
    written = Written()
    try:
        raise RuntimeError(f"it broke\n{FORGED}\x1b[2J")
    except RuntimeError:
        written.log().failure("while at {work}", work=f"it\n{FORGED}")
    first, *rest = written.out.getvalue().split("\n")[:-1]
    assert first.endswith(rf"[obdelta.web.devices.app#critical] while at it\n{FORGED}")
    assert len(rest) > 3 and all(line.startswith("\t") and "\x1b" not in line for line in rest)
    assert any("RuntimeError: it broke" in line for line in rest)


@pytest.mark.parametrize("how", ["text", "json"])
@pytest.mark.parametrize("when", ["\n2026", None, float("nan"), 1e300, -1e300, [1], "12"])
def test_an_invalid_time_is_replaced_by_now(how: str, when: object) -> None:
    """Events of other server processes arrive as JSON."""
    written = Written(how)
    written._publisher(
        {"log_format": "x", "log_level": LogLevel.info, "log_namespace": "a\nb", "log_time": when}
    )
    (line,) = written.out.getvalue().split("\n")[:-1]
    assert line.startswith("20") if how == "text" else json.loads(line)["message"] == "x"


def test_json_has_the_fields_of_the_message_only() -> None:
    written = Written("json")
    naming.within(
        "abc",
        lambda: written.log().info(
            "{path} {seconds} {who}", path="/\n", seconds=1.5, who=Path("x"), token="t"
        ),
    )
    (line,) = written.lines
    parsed = json.loads(line)
    assert parsed.pop("time").endswith("+00:00")
    assert parsed == {
        "level": "info",
        "area": "web.devices.app",
        "message": "/\n 1.5 x",
        "request": "abc",
        "fields": {"path": "/\n", "seconds": 1.5, "who": "x"},
    }


def test_json_of_a_failure_has_its_traceback() -> None:
    written = Written("json")
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        written.log().failure("while at {work}", work="it")
    parsed = json.loads(written.lines[0])
    assert (parsed["level"], parsed["message"]) == ("critical", "while at it")
    assert "RuntimeError: it broke" in parsed["traceback"]


def test_json_of_odd_events_is_valid() -> None:
    written = Written("json")
    for odd in (
        {"log_format": "{"},
        {"log_format": None},
        {"log_format": "plain"},
        {"log_text": "x", "log_format": "{log_text}"},
    ):
        event: LogEvent = {
            "log_level": LogLevel.info,
            "log_namespace": "obdelta.x",
            "log_time": 0.0,
            **odd,
        }
        written._publisher(event)
    parsed = [json.loads(line) for line in written.lines]
    assert [one["message"] for one in parsed][-2:] == ["plain", "x"]
    assert all("fields" not in one for one in parsed)


def test_each_area_may_have_its_level() -> None:
    written = Written(all_="warn", registry="debug", web_site="error", twisted_internet="info")
    for namespace in (
        "obdelta.registry.http.transport",
        "obdelta.web.devices.app",
        "obdelta.web.x",
        "obdelta.registryx",
        "twisted.internet.y",
    ):
        for level in (LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error):
            written.log(namespace).emit(level, "{n} {l}", n=namespace.split(".")[1], l=level.name)
    assert [line.partition("] ")[2] for line in written.lines] == [
        "registry debug",
        "registry info",
        "registry warn",
        "registry error",
        "web error",
        "web warn",
        "web error",
        "registryx warn",
        "registryx error",
        "internet info",
        "internet warn",
        "internet error",
    ]


def test_the_setting_of_levels_is_parsed() -> None:
    given = {
        "upstream": "oci:/x",
        "public-url": "http://x",
        "auth": "none",
        "log-level": "warn, registry=debug web.site=info",
    }
    found = settings.read(given, {}, None)
    assert found.log_level == {"": "warn", "registry": "debug", "web.site": "info"}
    assert settings.read({**given, "log-level": "net=error"}, {}, None).log_level == {
        "": "info",
        "net": "error",
    }


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
    assert naming.accepted(given) == (given.decode() if name and given is not None else None)


# -- who may name a request --------------------------------------------------------------------


class Naming(Resource):
    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)

    def render_GET(self, request: Request) -> bytes:
        return naming.current().encode()


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
    channel = make_site(Naming(), Clock(), clients=clients).buildProtocol(
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


# -- where the name goes -----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_parallel_requests_keep_their_ids() -> None:
    gates: list[Deferred[None]] = [Deferred(), Deferred()]
    seen: list[str] = []

    async def work(gate: Deferred[None]) -> None:
        await gate
        seen.append(naming.current())
        await ensureDeferred(inner())

    async def inner() -> None:
        seen.append(naming.current())

    def begin(gate: Deferred[None]) -> None:
        ensureDeferred(work(gate))

    for name, gate in zip(("one", "two"), gates, strict=True):
        naming.within(name, partial(begin, gate))
    for gate in reversed(gates):
        gate.callback(None)
    assert seen == ["two", "two", "one", "one"]
    assert naming.current() == ""


@pytest_twisted.ensureDeferred
async def test_workers_get_the_request_id_with_their_jobs() -> None:
    echo = (
        "import sys, json\nfor line in sys.stdin:\n    print(json.dumps({'result':"
        " json.loads(line)}), flush=True)\n"
    )
    pool = WorkerPool(reactor, 1, command=(sys.executable, "-c", echo))

    async def ask() -> object:
        naming.begin("abc")
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
            naming.begin("abc")
            await ask()

        await ensureDeferred(named())
        await ask()
        await client.close()
    assert recording.names == [b"abc", None]


def test_events_of_another_process_keep_their_request_id() -> None:
    parsed: list[LogEvent] = []
    naming.within("abc", lambda: parsed.append(with_request({"log_format": "x"})))
    written = Written()
    written._publisher(
        {**parsed[0], "log_level": LogLevel.info, "log_namespace": "obdelta.x", "log_time": 0.0}
    )
    assert written.lines[0].endswith("x request=abc")


# -- a running server --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("server") / "state"
    with running_server(
        state, upstream=f"oci:{pair.root}", log_format="json", log_level="info, builds=debug"
    ) as running:
        assert update(running, state.parent / "device").is_delta
        yield running


def events(server: RunningServer) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.splitlines()]


def test_every_line_is_an_object(server: RunningServer) -> None:
    parsed = events(server)
    assert {"time", "level", "area", "message"} <= set.intersection(
        *(set(event) for event in parsed)
    )
    areas = {event["area"] for event in parsed}
    assert {"web.devices.app", "builds.running_build"} <= areas


def test_a_build_logs_the_id_of_the_request_that_started_it(server: RunningServer) -> None:
    parsed = events(server)
    lines = [event for event in parsed if str(event["message"]).startswith("build: ")]
    (build,) = [event for event in lines if " form=gzip " in str(event["message"])]
    requests = [
        event
        for event in parsed
        if event.get("request") == build["request"] and event["area"] == "web.devices.app"
    ]
    assert len(requests) == 1
    fields = requests[0]["fields"]
    assert isinstance(fields, dict)
    assert fields["path"] == "/api/v3/delta"


def test_errors_say_what_to_look_for(server: RunningServer) -> None:
    for path, refusals in (
        ("/api/v3/delta", 0),  # a wrong request
        (f"/v2/{TARGET_REPOSITORY}/manifests/none", 1),
    ):
        requests = urllib.request.Request(
            f"{server.url}{path}", headers={"X-Request-Id": f"mine{len(path)}"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(requests, timeout=30)
        with refused.value as error:
            assert error.headers["x-request-id"] == f"mine{len(path)}"
            body = error.read().decode()
        # The upstream's answer is passed on unchanged.
        assert f"mine{len(path)}" in body or "none" in path
        parsed = [event for event in events(server) if event.get("request") == f"mine{len(path)}"]
        assert {event["level"] for event in parsed} == {"info"}
        why = [event for event in parsed if str(event["message"]).startswith("refused: ")]
        assert (len(parsed), len(why)) == (1 + refusals, refusals)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.operator_url}/api/v1/nothing", timeout=30)
    with refused.value as error:
        assert json.loads(error.read())["error"]["request"] == error.headers["x-request-id"]


def test_messages_are_counted(server: RunningServer) -> None:
    with urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counts = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }
    assert counts['obdelta_log_messages_total{level="info"}'] > 3
    assert counts['obdelta_log_messages_total{level="warn"}'] >= 1  # AUTH IS OFF


@pytest.mark.parametrize("how", ["text", "json"])
def test_twistd_s_logfile_is_used(tmp_path: Path, how: str) -> None:
    """A server that cannot start says so there; standard output has nothing else."""
    given = (
        "--upstream=http://127.0.0.1:9",
        "--public-url=http://127.0.0.1:9",
        f"--state-dir={tmp_path / 'state'}",
        f"--listen=tcp:{free_port()}:interface=127.0.0.1",
        "--auth=none",
        "--operator-listen=tcp:x",
        f"--log-format={how}",
    )
    twistd, *rest = command(*given)
    ran = subprocess.run(
        [twistd, f"--logfile={tmp_path / 'log'}", *rest],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    log_text = (tmp_path / "log").read_text()
    assert "obdelta cannot start: " in log_text
    assert (
        all(json.loads(line) for line in log_text.splitlines())
        if how == "json"
        else log_text.startswith("20")
    )
