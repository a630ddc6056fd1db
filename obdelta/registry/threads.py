"""What the upstreams need of a thread pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(Protocol):
    """Where files are read and bytes are hashed (``obdelta.concurrency.threads.Threads`` is one)."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread and give back the outcome. Cancelling ends the wait, not the call."""
