"""The operators' HTTP endpoint: pages, health, metrics and API, on a port of its own (setting
``operator-listen``).

Devices never reach it. Reading needs no password, so it listens on the loopback address by default.
Even there, any web page open in an operator's browser could send requests to it.
:func:`refuse_other_sites` prevents that. Whatever is not read needs a login, in one place for all
routes: :mod:`obdelta.web.operators.login` decides who may act.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Final
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.builds.delta_actions import ActionRefused, UnknownDelta
from obdelta.errors import BadRequest, Denied, ObdeltaError, TooManyRequests
from obdelta.web.errors import status_of
from obdelta.web.operators.login import CHALLENGE, ActionGuard, LoginRequired
from obdelta.web.operators.routes import (
    Answer,
    Call,
    MethodNotAllowed,
    NotFound,
    Routes,
    Whole,
    as_json,
    text,
)
from obdelta.web.request import TimedRequest, abort, id_of, with_id

log = Logger()

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", re.ASCII)
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # With no-referrer, browsers would send no Origin with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Every answer has these: no page frames or loads it, and no browser guesses its type or stores it.
Pages add what they may load.
"""
_OPEN = "/healthz"
"""Served for any Host: it reveals nothing, and probes use many names."""


class OperatorApp(Resource):
    """Serves a table of routes; the wiring code adds to ``routes``.

    A GET is cancelled if its client disconnects; other methods run to their end. Under ``/api/``,
    or if JSON is requested, an error is ``{"error": {"type": …, "message": …, "request": …}}``. Its
    type is the error's class. Otherwise an error is one line of text.
    """

    isLeaf = True

    def __init__(self, guard: ActionGuard, hosts: Collection[str] = ()) -> None:
        """``guard`` decides who may change something. ``hosts``: non-local host names by which
        operators reach this endpoint.
        """
        Resource.__init__(self)
        self.routes = Routes()
        self._guard = guard
        self._hosts = frozenset(hosts)

    def render(self, request: Request) -> int:
        """Starts an answer."""
        for name, value in HEADERS.items():
            request.setHeader(name.encode("ascii"), value.encode("ascii"))
        answer = ensureDeferred(self._serve(request))
        if request.method in (b"GET", b"HEAD"):
            request.notifyFinish().addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, request)
        return NOT_DONE_YET

    async def _serve(self, request: Request) -> None:
        if request.path != _OPEN.encode():
            refuse_other_sites(request, self._hosts)
        route, call = self.routes.find(request)
        if isinstance(request, TimedRequest):
            request.route = route.pattern
        call = replace(call, client=self._guard.client(request))
        if route.method != "GET":
            call = replace(call, user=await self._guard.user(request))
        answer = await route.function(call)
        if not _left(request):
            answer.send(request)

    def _failed(self, failure: Failure, request: Request) -> None:
        error = failure.value
        if not isinstance(error, ObdeltaError | CancelledError):
            log.failure(
                "unexpected error at {path}",
                failure,
                path=ascii(request.path),
                request=id_of(request),
            )
        if failure.check(CancelledError) or _left(request):
            return
        if request.startedWriting or request.finished:
            abort(request)
        else:
            _error_answer(error, request).send(request)


def _left(request: Request) -> bool:
    return bool(getattr(request, "_disconnected", False))


def _error_answer(error: BaseException | None, request: Request) -> Answer:
    kind, status, message = "Unexpected", 500, "an unexpected error: see the log"
    headers = {}
    if isinstance(error, ObdeltaError):
        kind, status, message = type(error).__name__, status_of(error), str(error)
    if isinstance(error, NotFound | UnknownDelta):
        status = 404
    if isinstance(error, ActionRefused):
        status = 409
    if isinstance(error, LoginRequired):
        status, headers["www-authenticate"] = 401, CHALLENGE
    if isinstance(error, MethodNotAllowed):
        status, headers["allow"] = 405, error.allowed
    if isinstance(error, TooManyRequests) and error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if request.path.startswith(b"/api/") or b"application/json" in (
        request.getHeader(b"accept") or b""
    ):
        made = as_json(
            {"error": {"type": kind, "message": message, "request": id_of(request)}}, status
        )
    else:
        made = text(with_id(message, request).rstrip("\n"), status)
    return Whole(made.body, made.content_type, made.status, headers)


def refuse_other_sites(request: Request, hosts: Collection[str] = ()) -> None:
    """Raises Denied for requests that a page of another site made a browser send.

    Such a request names that site: in ``Host`` if the name was pointed at this machine ("DNS
    rebinding"), else in ``Origin``. No public name is an address or has no dot. Those,
    ``localhost`` and ``hosts`` are therefore accepted. Another site's page may link to ours, but
    loads nothing: its streams of events would take the places of operators.
    """
    given = (request.getHeader(b"host") or b"").decode("latin-1")
    match = _HOST.fullmatch(given)
    if match is None:
        raise BadRequest("the Host header is missing or cannot be read")
    name = (match[1] or match[2]).lower().removesuffix(".")
    if not (_is_address(name) or "." not in name or name.endswith(".localhost") or name in hosts):
        raise Denied(
            f"this page is not served under the name {name[:80]!a}: add it to operator-hosts"
        )
    ours = request.getHeader(b"sec-fetch-site") in (None, b"same-origin", b"none")
    if request.method in (b"GET", b"HEAD"):
        ours = ours or request.getHeader(b"sec-fetch-dest") == b"document"  # a link
    elif (origin := request.getHeader(b"origin")) is not None:
        ours = ours and _host_of_origin(origin) == given.lower()
    if not ours:
        raise Denied("the request comes from a page of another site")


def _host_of_origin(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Description:
    """Serves ``/openapi.yaml`` and ``/openapi.json``, the files beside this module. They are read
    once.
    """

    def __init__(self) -> None:
        here = files("obdelta.web.operators")
        self._yaml = (here / "openapi.yaml").read_bytes()
        self._json = (here / "openapi.json").read_bytes()

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/openapi.yaml", self.yaml)
        routes.add("GET", "/openapi.json", self.json)

    async def yaml(self, call: Call) -> Answer:
        """Returns the description in YAML."""
        return Whole(self._yaml, "application/yaml")

    async def json(self, call: Call) -> Answer:
        """Returns the description in JSON."""
        return Whole(self._json, "application/json")
