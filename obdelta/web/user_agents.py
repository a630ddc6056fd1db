"""User-Agent headers of devices: which form of a delta an engine reads, and which one the engine of
a supervisor's OS probably reads.

A wrong guess costs an old engine its update, and a new engine some bytes. So only certain headers
count. Sources: moby ``dockerversion/useragent.go``; balena-supervisor; engines' behaviour was
measured (``docs/wire-protocol.md``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twisted.web.http import Request

from obdelta.oci import Form

FIRST_ENGINE = 23
"""The first major version of moby, and so of balena-engine, that inflates zstd."""
FIRST_OS = (7, 2, 0)
"""The first release of balenaOS with balena-engine 25."""

_PRODUCTS = ("balenaEngine", "docker")
_VERSION = re.compile(
    r"([0-9]{1,2})\.[0-9]{1,2}\.[0-9]{1,3}(?:[-+~][0-9A-Za-z.+~-]{1,64})?", re.ASCII
)
_BEHIND = " UpstreamClient("
"""The engine puts this before the header of the program that calls its API."""
_CALLER = re.compile(r"(?:\\.|[^\\()])*\)", re.S)
"""That program's header, to the closing parenthesis: the engine escapes parentheses in it."""
_SUPERVISOR = re.compile(
    r"Supervisor/[0-9A-Za-z.+-]{1,64} \(Linux; "
    r"balenaOS ([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})(\+[0-9A-Za-z.]{1,32})?"
    r"(; [0-9A-Za-z ._-]{1,32})?\)",
    re.ASCII,
)


def user_agents(request: Request) -> Sequence[bytes]:
    """Returns all headers of that name."""
    return request.requestHeaders.getRawHeaders(b"user-agent", [])


def engine_form(user_agents: Sequence[bytes]) -> Form | None:
    """Returns the best form that the engine behind a registry request reads; None for an unknown
    client.

    ``user_agents`` are all headers of that name. More than one says nothing.
    """
    version = _engine_version(_only(user_agents))
    if version is None:
        return None
    return Form.ZSTD if version >= FIRST_ENGINE else Form.GZIP


def expected_form(user_agents: Sequence[bytes]) -> Form | None:
    """Returns the best form that the engine of a supervisor's device is expected to read; None
    if that is not known.

    The version of an ESR release of balenaOS is a date, which does not reveal the engine.
    """
    match = _SUPERVISOR.fullmatch(_only(user_agents))
    if match is None:
        return None
    major, minor, patch = (int(number) for number in match.group(1, 2, 3))
    return Form.ZSTD if (major, minor, patch) >= FIRST_OS else Form.GZIP


def _only(user_agents: Sequence[bytes]) -> str:
    if len(user_agents) != 1:
        return ""
    text = user_agents[0].decode("latin-1").strip(" ")
    return text if text.isascii() and text.isprintable() else ""


def _engine_version(text: str) -> int | None:
    own, behind, caller = text.partition(_BEHIND)
    products = own.split(" ")
    whole = not behind or _CALLER.fullmatch(caller) is not None
    if not whole or "," in own or sum(each.startswith(_PRODUCTS) for each in products) != 1:
        return None  # headers of two clients that a proxy has joined
    name, _, version = products[0].partition("/")
    match = _VERSION.fullmatch(version)
    return int(match[1]) if name in _PRODUCTS and match is not None else None
