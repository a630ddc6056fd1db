"""Routing table of the operators' endpoint: maps method and path to async functions, and parses
their arguments.

Functions raise :class:`~obdelta.errors.ObdeltaError` or :class:`NotFound`; the endpoint maps these
to statuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qs, parse_qsl, unquote_to_bytes

from twisted.web.server import Request

from obdelta.errors import BadRequest, ObdeltaError
from obdelta.net.http_limits import phrase_of

_PARAMETER = re.compile(r"\{([a-z_]+)(\.\.\.)?\}")


class NotFound(ObdeltaError):
    """Nothing is at this path, or the named object does not exist."""

    def __init__(self, why: str = "there is nothing at this path") -> None:
        super().__init__(why)


class MethodNotAllowed(ObdeltaError):
    """The path does not support this method. ``allowed`` is the value of ``Allow``."""

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(
            f"only {allowed} are served here"
            if "," in allowed
            else f"only {allowed} is served here"
        )


class Answer(Protocol):
    """The result of a route's function."""

    def send(self, request: Request) -> None:
        """Writes the whole response, or begins it with a producer. For HEAD, Twisted drops the
        body.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """A small, complete response."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(self, request: Request) -> None:
        """Sends the response at once and ends the request."""
        request.setResponseCode(self.status, phrase_of(self.status))
        for name, value in self.headers.items():
            request.setHeader(name.encode("ascii"), value.encode("latin-1"))
        request.setHeader(b"content-type", self.content_type.encode("ascii"))
        request.setHeader(b"content-length", str(len(self.body)).encode("ascii"))
        request.write(self.body)
        request.finish()


def text(body: str, status: int = 200) -> Whole:
    """Returns a plain-text response; a line feed is appended."""
    return Whole(body.encode("utf-8", "backslashreplace") + b"\n", status=status)


def as_json(value: object, status: int = 200) -> Whole:
    """Returns a JSON response (ASCII, so that any string can be encoded) with a line feed."""
    return Whole(json.dumps(value).encode("ascii") + b"\n", "application/json", status)


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a route. ``parameters`` holds the matches of the pattern's braces. ``user`` is
    who may act; "" for requests that only read. ``client``: whom limits count the request for.
    """

    request: Request
    parameters: Mapping[str, str]
    user: str = ""
    client: str = ""

    def argument(self, name: str, default: str | None = None) -> str | None:
        """Returns a query argument. Raises BadRequest if it is given twice."""
        query = self.request.uri.partition(b"?")[2]
        try:
            found = parse_qs(query.decode("ascii"), keep_blank_values=True, max_num_fields=50).get(
                name, []
            )
        except ValueError as error:
            raise BadRequest("the query cannot be read") from error
        if len(found) > 1:
            raise BadRequest(f"{name} is given more than once")
        return found[0] if found else default

    def needed(self, name: str) -> str:
        """Returns a required query argument. Raises BadRequest if it is missing or empty."""
        value = self.argument(name)
        if not value:
            raise BadRequest(f"{name} is missing from the query")
        return value

    def accepts_json(self) -> bool:
        """Returns whether JSON is requested: by ``?format=json``, or by an ``Accept`` with JSON and
        without HTML.
        """
        accept = self.request.getHeader(b"accept") or b""
        return self.argument("format") == "json" or (
            b"application/json" in accept and b"text/html" not in accept
        )

    def form(self) -> dict[str, str]:
        """Returns the fields of a form of our own pages. The site bounds the body's size. Raises
        BadRequest.
        """
        given = (self.request.getHeader(b"content-type") or b"").partition(b";")[0].strip().lower()
        content = self.request.content
        body = content.read() if content is not None else b""
        try:
            if given != b"application/x-www-form-urlencoded":
                raise ValueError
            return dict(parse_qsl(body.decode("ascii"), max_num_fields=50))
        except ValueError as error:
            raise BadRequest("the form cannot be read") from error

    def json(self) -> dict[str, object]:
        """Returns the request's body, a JSON object. The site bounds its size (HttpBounds.body).
        Raises BadRequest.
        """
        given = (self.request.getHeader(b"content-type") or b"").partition(b";")[0].strip().lower()
        if given != b"application/json":
            # This also blocks forms of other sites' pages, which cannot have this type.
            raise BadRequest("the body must be JSON, with Content-Type: application/json")
        content = self.request.content
        try:
            value = json.loads(content.read() if content is not None else b"")
        except (ValueError, RecursionError) as error:
            raise BadRequest("the body is not JSON") from error
        if not isinstance(value, dict):
            raise BadRequest("the body is not a JSON object")
        return value


Function = Callable[[Call], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. Metrics name the route by ``pattern``."""

    method: str
    pattern: str
    matcher: re.Pattern[str]
    function: Function


class Routes:
    """The table. In a pattern ``{name}`` matches one path segment, and ``{name...}`` the whole
    rest.
    """

    def __init__(self) -> None:
        self._routes: list[Route] = []

    def add(self, method: str, pattern: str, function: Function) -> None:
        """Adds a route; GET serves HEAD too. The first match wins. Raises ValueError for a
        duplicate.
        """
        if any((route.method, route.pattern) == (method, pattern) for route in self._routes):
            raise ValueError(f"{method} {pattern} is there already")
        expression, end = "", 0
        for match in _PARAMETER.finditer(pattern):
            inner = ".+" if match[2] else "[^/]+"
            expression += re.escape(pattern[end : match.start()]) + f"(?P<{match[1]}>{inner})"
            end = match.end()
        expression += re.escape(pattern[end:])
        self._routes.append(Route(method, pattern, re.compile(expression, re.DOTALL), function))

    def page(self, pattern: str, function: Function) -> None:
        """Adds a GET route for browsers that is no part of the described API."""
        self.add("GET", pattern, function)

    def form(self, pattern: str, function: Function) -> None:
        """Adds a POST route for forms of our pages that is no part of the described API."""
        self.add("POST", pattern, function)

    def find(self, request: Request) -> tuple[Route, Call]:
        """Returns the route of a request. Raises NotFound, MethodNotAllowed, or BadRequest if the
        path is not UTF-8.
        """
        try:
            path = unquote_to_bytes(request.path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRequest("the path is not UTF-8") from error
        method = request.method.decode("latin-1")
        allowed: list[str] = []
        for route in self._routes:
            match = route.matcher.fullmatch(path)
            if match is None:
                continue
            if route.method == ("GET" if method == "HEAD" else method):
                return route, Call(request, match.groupdict())
            allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
        raise MethodNotAllowed(", ".join(allowed)) if allowed else NotFound()
