"""A client's socket: whether it has unread bytes, whether the client has left, and its buffer."""

from __future__ import annotations

import select
from typing import Any

from twisted.internet.abstract import FileDescriptor

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
