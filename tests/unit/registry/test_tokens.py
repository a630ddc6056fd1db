"""Tokens: how they are requested, kept and shared. The clock is moved by the test, the realm is in
memory.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable
from typing import Any, cast

import pytest
from treq.testing import RequestTraversalAgent
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.errors import Denied, ObdeltaError, TooManyRequests, UpstreamUnavailable
from obdelta.registry import Credentials
from obdelta.registry.auth.credentials import Disclosure
from obdelta.registry.auth.tokens import Challenge, TokenRequest, Tokens, token_request
from obdelta.registry.http.transport import Http
from obdelta.registry.requests import Backoff, Retrier
from tests.support.logs import logged

BUILDER = Credentials.basic("builder", "pa55word", exchange=True)
REALM = "https://api.example.com/auth/v1/token"


class Realm(Resource):
    """Returns the tokens ``t1``, ``t2`` and so on; ``more`` is merged into the body, ``held``
    keeps requests waiting.
    """

    isLeaf = True

    def __init__(self) -> None:
        Resource.__init__(self)
        self.uris: list[bytes] = []
        self.authorizations: list[str | None] = []
        self.status, self.body, self.headers = 200, cast(Any, {"token": ...}), dict[str, str]()
        self.held: list[Request] | None = None

    def render_GET(self, request: Request) -> int:
        self.uris.append(request.uri)
        self.authorizations.append(request.getHeader("authorization"))
        if self.held is not None:
            self.held.append(request)
        else:
            self.answer(request)
        return NOT_DONE_YET

    def answer(self, request: Request) -> None:
        request.setResponseCode(self.status)
        for name, value in self.headers.items():
            request.setHeader(name, value)
        body = self.body
        if isinstance(body, dict):
            given = {
                key: f"t{len(self.uris)}" if value is ... else value for key, value in body.items()
            }
            body = json.dumps(given).encode()
        request.write(body)
        request.finish()


class Bench:
    """Tokens with a clock and a realm."""

    def __init__(self) -> None:
        self.clock, self.realm = Clock(), Realm()
        self.agent: Any = cast(Any, RequestTraversalAgent)(self.realm)
        http = Http(self.agent, self.clock)
        self.tokens = Tokens(
            http, self.clock, lambda: Retrier(Backoff(attempts=2, first=1.0), self.clock)
        )

    def settle(self, work: Awaitable[Credentials]) -> str | ObdeltaError:
        """Returns the token, or the error."""
        found: list[str | ObdeltaError] = []

        async def run() -> None:
            try:
                found.append((await work).secret)
            except ObdeltaError as error:
                found.append(error)

        ensureDeferred(run())
        for _ in range(20):
            self.agent.flush()
            if not found:
                self.clock.advance(0.1)
        return found[0]

    def ask(
        self, repository: str | None = "v2/a", credentials: Credentials = BUILDER
    ) -> str | ObdeltaError:
        challenge = Challenge("bearer", {"realm": REALM, "service": "registry2.example.com"})
        return self.settle(
            self.tokens.token(token_request(challenge, credentials, repository, secure=True))
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_request_to_the_realm(bench: Bench) -> None:
    assert bench.ask() == "t1"
    assert bench.ask(None) == "t2"
    assert bench.ask(credentials=Credentials.anonymous(exchange=True)) == "t3"
    base = b"/auth/v1/token?service=registry2.example.com"
    assert bench.realm.uris == [
        base + b"&scope=repository%3Av2%2Fa%3Apull",
        base,
        bench.realm.uris[0],
    ]
    basic = "Basic " + base64.b64encode(b"builder:pa55word").decode()
    assert bench.realm.authorizations == [basic, basic, None]


def test_a_realm_with_a_query_keeps_it(bench: Bench) -> None:
    request = TokenRequest(BUILDER, REALM + "?account=x", None, "repository:v2/a:pull")
    assert bench.settle(bench.tokens.token(request)) == "t1"
    assert bench.realm.uris == [b"/auth/v1/token?account=x&scope=repository%3Av2%2Fa%3Apull"]


def test_tokens_are_kept_while_they_last_by_scope(bench: Bench) -> None:
    bench.realm.body["expires_in"] = 300
    assert [bench.ask("v2/a"), bench.ask("v2/a"), bench.ask("v2/b"), bench.ask("v2/a")] == [
        "t1",
        "t1",
        "t2",
        "t1",
    ]
    bench.clock.advance(269)
    assert bench.ask("v2/a") == "t1"
    bench.clock.advance(2)
    assert bench.ask("v2/a") == "t3"


@pytest.mark.parametrize(
    ("more", "life"),
    [
        ({}, 60),
        ({"expires_in": 10}, 10),
        ({"expires_in": "300"}, 60),
        ({"expires_in": True}, 60),
        ({"expires_in": -5}, 60),
        ({"expires_in": 1e99}, 60),
        ({"expires_in": 300, "issued_at": "2025-07-01T09:58:20Z"}, 200),
        ({"expires_in": 300, "issued_at": "2025-07-01T09:58:20.123456789Z"}, 200),
        ({"expires_in": 300, "issued_at": "2025-07-01T11:58:20+02:00"}, 200),
        ({"expires_in": 300, "issued_at": "2025-07-01T10:30:00Z"}, 300),  # from the future
        ({"expires_in": 300, "issued_at": "yesterday"}, 300),
        ({"expires_in": 300, "issued_at": "2025-07-01T09:58:20"}, 300),  # of no time zone
        ({"expires_in": 300, "issued_at": 7}, 300),
        ({"expires_in": 60, "issued_at": "2025-07-01T09:00:00Z"}, 0),
    ],
)
def test_a_token_is_cached_for_its_lifetime(
    bench: Bench, more: dict[str, Any], life: float
) -> None:
    bench.realm.headers["date"] = "Tue, 01 Jul 2025 10:00:00 GMT"
    bench.realm.body.update(more)
    assert bench.ask() == "t1"
    if life:
        bench.clock.advance(life * 0.9 - 1)
        assert bench.ask() == "t1"
        bench.clock.advance(2)
    assert bench.ask() == "t2"


def test_the_expiry_inside_a_token_is_not_read(bench: Bench) -> None:
    claims = base64.urlsafe_b64encode(b'{"exp":99999999999}').decode().rstrip("=")
    bench.realm.body = {"access_token": f"e30.{claims}.c2ln", "expires_in": 10}
    bench.ask()
    bench.clock.advance(11)
    bench.ask()
    assert len(bench.realm.uris) == 2


def test_parallel_requests_for_a_token_share_one_request(bench: Bench) -> None:
    bench.realm.held = []
    request = TokenRequest(BUILDER, REALM, None, "repository:v2/a:pull")
    found: list[str] = []

    async def ask() -> None:
        found.append((await bench.tokens.token(request)).secret)

    tasks = [ensureDeferred(ask()) for _ in range(5)]
    bench.agent.flush()
    # The first client leaves; the others still get their token.
    tasks[0].cancel()
    tasks[0].addErrback(lambda _: None)
    for held in bench.realm.held:
        bench.realm.answer(held)
    bench.agent.flush()
    assert found == ["t1"] * 4 and len(bench.realm.uris) == 1


def test_a_refused_token_is_forgotten(bench: Bench) -> None:
    request = TokenRequest(BUILDER, REALM, None, "repository:v2/a:pull")
    assert bench.settle(bench.tokens.token(request)) == "t1"
    bench.tokens.forget(request, Credentials.bearer("another"))
    assert bench.settle(bench.tokens.token(request)) == "t1"
    bench.tokens.forget(request, Credentials.bearer("t1"))
    assert bench.settle(bench.tokens.token(request)) == "t2"


@pytest.mark.parametrize(
    ("status", "body", "expected", "requests"),
    [
        (401, b"{}", Denied, 1),
        (403, b"{}", Denied, 1),
        (404, b"{}", UpstreamUnavailable, 1),
        (302, b"", UpstreamUnavailable, 1),
        (429, b"", TooManyRequests, 2),
        (500, b"", UpstreamUnavailable, 2),
        (200, b"", UpstreamUnavailable, 1),
        (200, b"<html>", UpstreamUnavailable, 1),
        (200, b"[" * 100_000, UpstreamUnavailable, 1),
        (200, b"[]", UpstreamUnavailable, 1),
        (200, b"{}", UpstreamUnavailable, 1),
        (200, b'{"token": 7}', UpstreamUnavailable, 1),
        (200, b'{"token": "a\\r\\nX: y"}', UpstreamUnavailable, 1),
        (200, b'{"token": "' + b"a" * 300_000 + b'"}', UpstreamUnavailable, 1),
    ],
)
def test_a_realm_that_gives_no_token(
    bench: Bench, status: int, body: bytes, expected: type[ObdeltaError], requests: int
) -> None:
    bench.realm.status, bench.realm.body = status, body
    bench.realm.headers["location"] = "https://elsewhere.example.com/"
    found = bench.ask()
    assert isinstance(found, expected)
    assert "pa55word" not in str(found) and "\n" not in str(found)
    assert len(bench.realm.uris) == requests
    # No token is kept.
    bench.realm.status, bench.realm.body = 200, {"token": ...}
    assert bench.ask() == f"t{requests + 1}"


@pytest.mark.parametrize(
    "realm",
    [
        "http://api.example.com/token",  # credentials over plain http, though the registry is https
        "",
        "/auth/v1/token",
        "ftp://api.example.com/",
        "https://",
        "https://user:pw@api.example.com/token",
        "https://api.example.com/token#x",
        "https://api.example.com:99999/",
        "https://api.example.com/a b",
        "https://api.example.com/\r\nX: y",
    ],
)
def test_untrusted_realms_get_no_credentials(realm: str) -> None:
    with pytest.raises(UpstreamUnavailable):
        token_request(Challenge("bearer", {"realm": realm}), BUILDER, "v2/a", secure=True)


@pytest.mark.parametrize(
    ("realms", "allowed"),
    [
        (None, True),
        ({"api.example.com"}, True),
        ({"api.example.com:443", "other.example.com"}, False),
        ({"registry2.example.com"}, False),
        (set(), False),
    ],
)
def test_a_password_is_sent_only_to_named_realms(realms: set[str] | None, allowed: bool) -> None:
    challenge = Challenge("bearer", {"realm": "https://API.example.com/auth/v1/token"})
    disclosure = Disclosure(None if realms is None else frozenset(realms))
    anonymous = Credentials.anonymous(exchange=True)
    assert (
        token_request(challenge, anonymous, "v2/a", secure=True, disclosure=disclosure).credentials
        == anonymous
    )
    if allowed:
        assert (
            token_request(
                challenge, BUILDER, "v2/a", secure=True, disclosure=disclosure
            ).credentials
            == BUILDER
        )
    else:
        with pytest.raises(
            UpstreamUnavailable, match=r"was not sent: add the host to token-realms"
        ):
            token_request(challenge, BUILDER, "v2/a", secure=True, disclosure=disclosure)


def test_a_plain_registry_may_have_a_plain_realm() -> None:
    challenge = Challenge(
        "bearer", {"realm": "http://127.0.0.1/token", "scope": "repository:v2/other:push"}
    )
    # The request to the realm names one repository, even where the challenge names more.
    expected = TokenRequest(BUILDER, "http://127.0.0.1/token", None, "repository:v2/a:pull")
    assert token_request(challenge, BUILDER, "v2/a", secure=False) == expected


def test_the_realms_host_is_logged_once_and_secrets_never(bench: Bench) -> None:
    with logged("debug", "info", "warn", "error", "critical") as lines:
        bench.ask("v2/a")
        bench.ask("v2/b")
        bench.realm.status = 500
        bench.ask("v2/c")
    assert [
        line for line in lines if "tokens for the upstream come from api.example.com" in line
    ] == lines[:1]
    assert not any(
        secret in line for line in lines for secret in ("pa55word", "t1", "t2", "cGE1NXdvcmQ")
    )
