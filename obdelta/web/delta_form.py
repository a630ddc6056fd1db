"""Chooses the form of a delta for a device, by the User-Agent header of its engine, or of its
supervisor.

A wrong guess costs an old engine its update, and a new engine some bytes. So only certain headers
count. Sources: moby ``dockerversion/useragent.go``; balena-supervisor; engines' behaviour was
measured (``docs/wire-protocol.md``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twisted.web.http import Request

from obdelta.builds.publish.delta_tags import tag_in
from obdelta.errors import FormUnreadable
from obdelta.oci import Descriptor, Form

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


def requested_form(request: Request, *, engine_follows: bool) -> Form | None:
    """Returns the best form that the device of a supervisor reads, None if that is not known yet.

    ``engine_follows``: its engine requests the manifest from this server, and tells it then.
    """
    form = expected_form(_user_agents(request))
    return form if form is not None or engine_follows else Form.UNIVERSAL


def best_form(request: Request, tag: str) -> Form:
    """Returns the best form that the engine of a registry request reads. An unknown client gets
    what the tag names.
    """
    return form_of(request) or Form.of_tag(tag)


def tags_for(request: Request, tag: str) -> tuple[str, ...]:
    """Returns the tags of a delta in the forms that the client reads, best first."""
    return tuple(tag_in(tag, form) for form in best_form(request, tag).readable)


def require_readable(request: Request, blob: Descriptor) -> None:
    """Raises FormUnreadable for a blob of a delta image that the client's engine cannot read.
    Engines retry a refused layer without end, but end a pull at once whose config is refused.
    """
    form, best = Form.of_delta_blob(blob.media_type), form_of(request)
    if best is not None and form not in best.readable:
        raise FormUnreadable(blob.digest, form.value)


def form_of(request: Request) -> Form | None:
    """Returns the best form that the engine of a registry request reads; None for an unknown
    client.
    """
    return engine_form(_user_agents(request))


def _user_agents(request: Request) -> Sequence[bytes]:
    return request.requestHeaders.getRawHeaders(b"user-agent", [])


def engine_form(user_agents: Sequence[bytes]) -> Form | None:
    """Returns the best form that the engine behind a registry request reads; None for an unknown
    client.

    ``user_agents`` are all headers of that name. More than one says nothing.
    """
    version = _engine_version(_only(user_agents))
    return None if version is None else Form.of_engine(version)


def expected_form(user_agents: Sequence[bytes]) -> Form | None:
    """Returns the best form that the engine of a supervisor's device is expected to read; None
    if that is not known.

    The version of an ESR release of balenaOS is a date, which does not reveal the engine.
    """
    match = _SUPERVISOR.fullmatch(_only(user_agents))
    if match is None:
        return None
    major, minor, patch = (int(number) for number in match.group(1, 2, 3))
    return Form.of_os((major, minor, patch))


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
