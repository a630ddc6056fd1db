"""Limits of HTTP connections and their sockets, the syntax of requests, and the response to a
request that breaks one of them.
"""

from __future__ import annotations

import json
import re
import select
import string
from dataclasses import dataclass
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.web.http import RESPONSES
from twisted.web.http_headers import Headers

_PHRASES = {
    400: "Bad Request",
    405: "Method Not Allowed",
    413: "Content Too Large",
    414: "URI Too Long",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
}
FEW_CONNECTIONS = 64
"""Connections that may each buffer much in memory. With more connections, each buffers little."""
MAX_ABANDONED = 100
"""Requests that one address may abandon at once: above it, its new connections are closed."""
ABANDONED_PER_SECOND = 10.0
"""Abandoned requests of one address that are forgotten each second."""
ACCEPT_AT_ONCE = 8
"""Connections that a port accepts in one turn of the reactor."""


def phrase_of(status: int) -> bytes:
    """Returns the reason phrase of a status. Twisted's table ends with RFC 2616."""
    return (
        _PHRASES[status].encode()
        if status in _PHRASES
        else RESPONSES.get(status, b"Unknown Status")
    )


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """Limits of a connection. Sizes in bytes, times in seconds.

    ``line`` bounds the request line and each header line (a token of 16 KiB must fit), ``headers``
    all of them together. ``header_time`` runs to the end of the headers. It begins with the
    connection (TLS handshake included), or with the first byte of a later request. ``idle`` is the
    time between requests, and the time for a request body. ``methods``, if given, are those with
    an answer. Other requests are refused before their body is read.
    """

    line: int = 20 * 1024
    headers: int = 32 * 1024
    header_count: int = 100
    body: int = 1 << 20
    header_time: float = 20.0
    idle: float = 60.0
    methods: tuple[bytes, ...] = ()


def refusal(
    status: int,
    code: str,
    why: str,
    retry_after: float | None = None,
    *,
    allow: str | None = None,
) -> bytes:
    """Returns a whole HTTP response with the reason in a registry's JSON. It ends the connection.

    ``code`` is an error code of the OCI distribution specification. ``retry_after`` is in seconds.
    """
    errors = [{"code": code, "message": why, "detail": None}]
    body = json.dumps({"errors": errors}).encode() + b"\n"
    head = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if allow is not None:
        head.append(f"Allow: {allow}")
    if retry_after is not None:
        head.append(f"Retry-After: {retry_after:.0f}")
    return "\r\n".join([*head, "", ""]).encode() + body


BEGINS_REQUEST = frozenset(b"!#$%&'*+-.^_`|~\r\n" + (string.digits + string.ascii_letters).encode())
"""Bytes that may begin a request: those of a method (RFC 9110, section 5.6.2), and the empty line
that some clients send first.
"""
TLS_HANDSHAKE = 0x16
_SINGLE = (b"host", b"authorization")
"""Header fields that may occur once: proxies on the way could pick another one of two."""
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
"""A ``Host`` value, which may be empty (RFC 9110, section 7.2)."""
_ABSOLUTE = re.compile(rb"https?://([^/?]+)([^\x00-\x20]*)", re.IGNORECASE)
"""A request target in absolute form (RFC 9112, section 3.2.2): authority, and path with query."""
LENGTH_DIGITS = 18
"""Maximum number of digits of a Content-Length."""


class Malformed(Exception):
    """A request that RFC 9112 requires a server to refuse."""


def checked_target(method: bytes, target: bytes, version: bytes, headers: Headers) -> bytes:
    """Returns the request target in origin form. Raises Malformed.

    The host of an absolute target replaces the ``Host`` header.
    Source: RFC 9112, sections 3.2 (targets, Host) and 5; RFC 9110, sections 4.2.4 and 5.3.
    """
    for name in _SINGLE:
        if len(headers.getRawHeaders(name, [])) > 1:
            raise Malformed(f"there are several {name.decode()} headers")
    (host,) = headers.getRawHeaders(b"host", [None])
    if host is None and version == b"HTTP/1.1":
        raise Malformed("there is no Host header")
    if host is not None and _HOST.fullmatch(host) is None:
        raise Malformed("the Host header names no host")
    if b"#" in target:
        raise Malformed("the request target has a fragment")
    if target.startswith(b"/") or method == b"CONNECT" or (target == b"*" and method == b"OPTIONS"):
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise Malformed("the request target is no path")
    headers.setRawHeaders(b"host", [absolute[1]])
    return absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]


def accept_few(port: Any) -> None:
    """Makes a port accept a few connections in each turn of the reactor. Twisted accepts all that
    wait, up to thousands.

    Where several processes accept from one queue, the first one awake would get them all. A
    connection in the queue also costs less, and its time-out begins later.
    """
    accept = port.doRead

    def accept_one_batch() -> None:
        port.numberAccepts = ACCEPT_AT_ONCE
        accept()

    port.doRead = accept_one_batch


_CLOSED_BY_CLIENT = getattr(select, "POLLRDHUP", 0)
"""Linux reports a client's FIN. Elsewhere poll reports only resets, for which it needs no flag."""


def _socket_below(transport: Any) -> Any:
    """Returns the socket's transport below TLS and the PROXY protocol."""
    while (lower := getattr(transport, "transport", None)) is not None:
        transport = lower
    return transport


def has_unread_bytes(transport: Any) -> bool:
    """Returns whether the client has sent bytes that are still unread. ``transport`` is a socket's,
    or one on top of it.
    """
    return bool(_poll(transport, select.POLLIN))


def has_disconnected(transport: Any) -> bool:
    """Returns whether the client has closed its side or reset the connection. ``transport``: as for
    :func:`has_unread_bytes`.
    """
    return bool(_poll(transport, _CLOSED_BY_CLIENT))


def limit_buffer(transport: Any, size: int) -> None:
    """Makes producers pause once ``size`` bytes wait to be sent. ``transport``: as for
    :func:`has_unread_bytes`.
    """
    below = _socket_below(transport)
    if isinstance(below, FileDescriptor):
        below.bufferSize = size


def _poll(transport: Any, events: int) -> int:
    """Returns those of ``events`` that the socket has now, and POLLHUP and POLLERR in any case."""
    below = _socket_below(transport)
    if not hasattr(below, "fileno") or below.fileno() < 0:
        return 0
    looking = select.poll()
    looking.register(below.fileno(), events)
    return next((found for _, found in looking.poll(0)), 0)
