"""Waits on the reactor for what sends no event; tests/support/processes.py has the blocking one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from twisted.internet.task import deferLater

from tests.support.web import reactor

T = TypeVar("T")
_SECONDS = 60.0


async def eventually(what: str, found: Callable[[], T]) -> T:
    """Returns the value of ``found`` once it is true. The reactor runs meanwhile."""
    deadline = time.monotonic() + _SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {_SECONDS:g} s: {what}"
        await deferLater(reactor, 0.01)
    return value
