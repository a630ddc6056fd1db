"""A table of routes: method and path to an async function that gives an answer.

Functions raise what they cannot do (:class:`~obdelta.errors.ObdeltaError`, :class:`NotFound`); the
table makes statuses of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qs, unquote_to_bytes

from twisted.web.server import Request

from obdelta.errors import BadRequest, ObdeltaError
from obdelta.net.http_server import phrase_of

_PARAMETER = re.compile(r"\{([a-z_]+)(\.\.\.)?\}")


class NotFound(ObdeltaError):
    """Nothing is at this path, or what it names does not exist."""

    def __init__(self, why: str = "there is nothing at this path") -> None:
        super().__init__(why)


class MethodNotAllowed(ObdeltaError):
    """The path is served, by other methods. ``allowed`` is the value of ``Allow``."""

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(
            f"only {allowed} are served here"
            if "," in allowed
            else f"only {allowed} is served here"
        )


class Answer(Protocol):
    """What a route's function gives back."""

    def send(self, request: Request) -> None:
        """Write the whole answer, or begin it with a producer. HEAD gets the headers; Twisted drops
        the body.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """A small answer, complete."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(self, request: Request) -> None:
        """At once."""
        request.setResponseCode(self.status, phrase_of(self.status))
        for name, value in self.headers.items():
            request.setHeader(name.encode("ascii"), value.encode("latin-1"))
        request.setHeader(b"content-type", self.content_type.encode("ascii"))
        request.setHeader(b"content-length", str(len(self.body)).encode("ascii"))
        request.write(self.body)
        request.finish()


def text(body: str, status: int = 200) -> Whole:
    """Plain text; a line feed is put behind it."""
    return Whole(body.encode("utf-8", "backslashreplace") + b"\n", status=status)


def as_json(value: object, status: int = 200) -> Whole:
    """JSON (ASCII, so that any string can be told), and a line feed."""
    return Whole(json.dumps(value).encode("ascii") + b"\n", "application/json", status)


@dataclass(frozen=True, slots=True)
class Call:
    """One request that a route got. ``parameters``: what the pattern's braces matched."""

    request: Request
    parameters: Mapping[str, str]

    def argument(self, name: str, default: str | None = None) -> str | None:
        """A query argument; given twice is BadRequest."""
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
        """A query argument that must be there."""
        value = self.argument(name)
        if not value:
            raise BadRequest(f"{name} is missing from the query")
        return value

    def accepts_json(self) -> bool:
        """Whether JSON was asked for: ``?format=json`` or in ``Accept``, and no page at the same
        time.
        """
        accept = self.request.getHeader(b"accept") or b""
        return self.argument("format") == "json" or (
            b"application/json" in accept and b"text/html" not in accept
        )

    def json(self) -> dict[str, object]:
        """The request's body, a JSON object; the site bounds its size (HttpBounds.body)."""
        given = (self.request.getHeader(b"content-type") or b"").partition(b";")[0].strip().lower()
        if given != b"application/json":
            # Also because a form of a strange web page cannot have this type.
            raise BadRequest("the body must be JSON, and Content-Type say so")
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
    """``pattern`` as it was given: what metrics name the route by."""

    method: str
    pattern: str
    matcher: re.Pattern[str]
    function: Function


class Routes:
    """The table. ``{name}`` in a pattern is one segment of a path, ``{name...}`` all the rest of
    it.
    """

    def __init__(self) -> None:
        self._routes: list[Route] = []

    def add(self, method: str, pattern: str, function: Function) -> None:
        """A route; GET serves HEAD too. The first that matches is taken; one and the same twice is
        ValueError.
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
        """GET of what is for people and their browsers, and no part of the API that is described."""
        self.add("GET", pattern, function)

    @property
    def patterns(self) -> list[tuple[str, str]]:
        """Method and pattern of every route, in the table's order."""
        return [(route.method, route.pattern) for route in self._routes]

    def find(self, request: Request) -> tuple[Route, Call]:
        """The route of a request. NotFound, MethodNotAllowed; BadRequest for a path that is not
        UTF-8.
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
