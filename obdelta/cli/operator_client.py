"""Client of a running server's operators' endpoint, for commands."""

from __future__ import annotations

import argparse
import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from obdelta import __version__
from obdelta.cli.options import WrongUsage, read_secret, read_settings
from obdelta.device.http import Answer, Http, ServerFault
from obdelta.errors import SettingsError, without_login
from obdelta.store import operator_address

_MAX_ANSWER = 64 << 20
_SPLIT = re.compile(r"(?<!\\):")


def operator(parsed: argparse.Namespace, *, timeout: float = 60.0) -> Operator:
    """Returns the endpoint of the options, or else of the settings. Raises WrongUsage,
    SettingsError.
    """
    where, key = (parsed.operator, None) if parsed.operator else _from_settings(parsed)
    remedy = "" if parsed.operator else _OTHER
    if without_login(where) != where:
        raise WrongUsage(
            f"{without_login(where)}: other users can read the command line: put the login into"
            " a file (--login)"
        )
    headers = {}
    if parsed.login is not None:
        login = read_secret(parsed.login, "--login").encode("ascii")
        headers["Authorization"] = f"Basic {base64.b64encode(login).decode('ascii')}"
    elif key is not None:
        headers["Authorization"] = f"Bearer {key.hex()}"
    if where.startswith("unix:"):
        path = where.removeprefix("unix:")
        http = Http(_AGENT, timeout=timeout, socket=Path(path))
        return Operator(where, "http://localhost", http, headers, remedy)
    if not re.match(r"https?://[^/?#\s]+/?\Z", where):
        raise WrongUsage(
            f"{where!a} is not the URL of an operators' endpoint (http://HOST:PORT or unix:PATH)"
        )
    url = where.rstrip("/")
    return Operator(url, url, Http(_AGENT, timeout=timeout), headers, remedy)


_AGENT = f"obdelta/{__version__}"
_OTHER = ": is it running? -c FILE or --operator URL names another server"
"""The remedy for a server that the settings name, and that does not answer."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A server's operators' endpoint. Every method raises ServerFault, whose text has the endpoint
    as given.

    ``headers`` are part of every request. ``remedy`` follows the reason if there is no answer.
    """

    displayed: str
    url: str
    http: Http
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    remedy: str = ""

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Returns a JSON object."""
        return self._request("GET", _with(path, query))

    def post(
        self, path: str, body: Mapping[str, Any], *, authorization: str | None = None
    ) -> dict[str, Any]:
        """Sends a JSON object and returns one. The server passes
        ``authorization`` to the upstream.
        """
        return self._request("POST", path, json.dumps(body).encode(), authorization)

    def download(self, path: str, out: Path, received: Callable[[int], None]) -> int:
        """Writes a body to a new file and returns its size in bytes. ``received`` gets each piece's
        size.
        """
        with self._open("GET", path) as answer, out.open("wb") as file:
            size = 0
            for chunk in answer.chunks():
                file.write(chunk)
                size += len(chunk)
                received(len(chunk))
        return size

    def _request(
        self, method: str, path: str, body: bytes | None = None, authorization: str | None = None
    ) -> dict[str, Any]:
        with self._open(method, path, body, authorization) as answer:
            return self._json(answer)

    def _open(
        self, method: str, path: str, body: bytes | None = None, authorization: str | None = None
    ) -> _OpenedResponse:
        return _OpenedResponse(self, method, path, body, authorization)

    def _json(self, answer: Answer) -> dict[str, Any]:
        try:
            value = json.loads(answer.small(_MAX_ANSWER))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self.fault(
                "did not answer with JSON: is it the operators' endpoint of an obdelta?",
                answer.status,
            )
        return value

    @contextmanager
    def parsing(self, what: str) -> Iterator[None]:
        """In this block an answer is parsed. Missing or unexpected fields become ServerFault."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise self.fault(f"answered with {what} that this version cannot read") from error

    def fault(self, why: str, status: int | None = None) -> ServerFault:
        """Returns the error to raise."""
        return ServerFault(f"the server at {self.displayed}", why, status=status)


class _OpenedResponse:
    """A context manager for an answer whose status is 2xx."""

    def __init__(
        self, where: Operator, method: str, path: str, body: bytes | None, authorization: str | None
    ) -> None:
        self._where = where
        headers = dict(where.headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
        if authorization is not None:
            headers["X-Registry-Authorization"] = authorization
        self._response = where.http.request(method, f"{where.url}{path}", headers, body=body)

    def __enter__(self) -> Answer:
        try:
            answer = self._response.__enter__()
        except ServerFault as error:
            why = re.sub(r"^failed( at \S+)?: (\[Errno -?\d+\] )?", "", error.why)
            reason = f"cannot be reached: {why}{self._where.remedy}"
            raise self._where.fault(reason, error.status) from error
        if answer.status // 100 != 2:
            try:
                raise self._where.fault(_reason(answer), answer.status)
            finally:
                self._response.__exit__(None, None, None)
        return answer

    def __exit__(self, *raised: Any) -> None:
        self._response.__exit__(*raised)


def _reason(answer: Answer) -> str:
    body = answer.small(_MAX_ANSWER)
    try:
        return f"says: {json.loads(body)['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"answered {answer.status}: is it the operators' endpoint of an obdelta?"


def _with(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(query, quote_via=quote)}" if query else path


def _from_settings(parsed: argparse.Namespace) -> tuple[str, bytes | None]:
    """Returns the endpoint, and the key of those who can read ``state-dir``."""
    # These commands need no server settings.
    configured = read_settings(
        parsed, {"public-url": "http://localhost", "upstream": "http://localhost"}
    )
    try:
        key = (configured.state_dir / "operator-key").read_bytes()
    except OSError:
        key = None  # another user, or another machine: the server says what an action needs
    if (running := operator_address.find(configured.state_dir)) is not None:
        return running, key
    for endpoint in configured.operator_listen:
        kind, *rest = (part.replace("\\:", ":") for part in _SPLIT.split(endpoint))
        named = dict(part.split("=", 1) for part in rest if "=" in part)
        plain = [part for part in rest if "=" not in part]
        if kind == "unix":
            return f"unix:{named.get('address') or plain[0]}", key
        if kind in ("tcp", "tcp6"):
            host = named.get("interface") or (plain[1] if len(plain) > 1 else "")
            return operator_address.url_of(host, named.get("port") or plain[0]), key
    displayed = "\n".join(configured.operator_listen)
    raise SettingsError(
        "operator-listen",
        displayed,
        "a tcp: or unix: endpoint for requests to the server; or use --operator",
    )
