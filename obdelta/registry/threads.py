"""The thread pool interface that upstreams use."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(Protocol):
    """Runs file reads and hashing (``obdelta.concurrency.threads.Threads`` is one)."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls in a thread and returns the result. Cancelling ends the wait, not the call."""
