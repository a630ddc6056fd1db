"""The request that work is done for, by a name that goes with it: through coroutines, builds,
workers, and to the upstream.

It is a context variable: coroutines that are begun inside another inherit it, and Twisted keeps it
over every await.
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
    """The name; "" outside of any request."""
    return _current.get()


def make() -> str:
    """A new one: 16 hex digits."""
    return secrets.token_hex(8)


def begin(name: str) -> None:
    """From here on, in this coroutine and what it begins."""
    _current.set(name)


def within(name: str, function: Callable[[], None]) -> None:
    """Calls a function as the beginning of a request; the caller's own context stays as it is."""

    def inside() -> None:
        begin(name)
        function()

    copy_context().run(inside)


def accepted(value: bytes | None) -> str | None:
    """A name that somebody trusted gave, None for what could not stand in a log line or a header."""
    return value.decode("ascii") if value is not None and _FIT.fullmatch(value) else None
