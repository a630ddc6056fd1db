"""Blocking work off the reactor thread, in a pool that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


def shielded(work: Deferred[T]) -> Deferred[T]:
    """A Deferred for the same outcome whose cancelling ends the wait and leaves ``work`` alone.

    A thread cannot be cancelled: without the shield, cancelling a wait would also lose the
    callbacks that keep our own books in step with what the thread did.
    """
    waiter: Deferred[T] = (
        Deferred()
    )  # without a canceller it takes no notice of what comes after a cancelling
    work.addCallbacks(waiter.callback, waiter.errback)
    return waiter


class Threads:
    """A reactor and a started pool. Whoever made the pool stops it, after everything that uses it."""

    def __init__(self, reactor: IReactorFromThreads, pool: ThreadPool) -> None:
        self.reactor = reactor
        self._pool = pool

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Queues a call. Its callbacks run whatever happens to those who wait: do not hand it out."""
        return deferToThreadPool(self.reactor, self._pool, function, *args, **kwargs)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls in a thread and gives back the outcome. Cancelling ends the wait; the call itself
        runs to its end.
        """
        return await shielded(self.start(function, *args, **kwargs))

    def soon(self, function: Callable[[], object]) -> None:
        """Calls in the reactor thread, in its next turn; others get theirs in between."""
        self.reactor.callFromThread(function)
