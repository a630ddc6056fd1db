"""The operators' endpoint: routes, access, and errors."""

from __future__ import annotations

import json
from typing import cast

import pytest
import pytest_twisted
from twisted.internet.address import IPv4Address
from twisted.web.server import Request
from twisted.web.test.requesthelper import DummyRequest

from obdelta.concurrency.tasks import Threads
from obdelta.errors import UpstreamUnavailable
from obdelta.net.client_address import TrustedProxies
from obdelta.web.operators.app import OperatorApp
from obdelta.web.operators.login import ActionGuard, ProxyLogin
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json, text
from tests.support.logs import logged
from tests.support.operators import GUARD, KEY, LOGIN, asking
from tests.support.web import reactor


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


@pytest.mark.parametrize(
    ("peer", "header", "client"),
    [
        ("127.0.0.1", [b"alice"], "user alice"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", [b"alice", b"bob"], "127.0.0.1"),
        ("192.0.2.1", [b"alice"], "192.0.2.1"),
    ],
)
def test_limits_count_by_the_proxy_s_user_or_the_address(
    peer: str, header: list[bytes], client: str
) -> None:
    proxy = ProxyLogin("X-User", TrustedProxies(["127.0.0.1"]), False)
    guard = ActionGuard(KEY, Threads(reactor, reactor.getThreadPool()), reactor, proxy=proxy)
    request = DummyRequest([b""])
    request.getClientAddress = lambda: IPv4Address("TCP", peer, 1)  # type: ignore[method-assign]
    request.requestHeaders.setRawHeaders(b"x-user", header)
    assert guard.client(cast(Request, request)) == client
