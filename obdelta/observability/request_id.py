"""The ID of the request that work is done for: in coroutines, builds, worker processes and upstream
requests.

It is a context variable: coroutines that start inside another inherit it, and Twisted keeps it over
every await.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextvars import ContextVar, copy_context

HEADER = b"x-request-id"
_current: ContextVar[str] = ContextVar("obdelta_request", default="")
_FIT = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,64}", re.ASCII)


def current() -> str:
    """Returns the current ID, "" outside of any request."""
    return _current.get()


def make() -> str:
    """Returns a new ID: 16 hex digits."""
    return secrets.token_hex(8)


def begin(name: str) -> None:
    """Sets the ID for this coroutine, and for those that it starts."""
    _current.set(name)


def within(name: str, function: Callable[[], None]) -> None:
    """Calls a function with its own request ID. The caller's context stays as it is."""

    def inside() -> None:
        begin(name)
        function()

    copy_context().run(inside)


def accepted(value: bytes | None) -> str | None:
    """Returns an ID from a trusted sender, None for one that is unfit for a log
    line or a header.
    """
    return value.decode("ascii") if value is not None and _FIT.fullmatch(value) else None
