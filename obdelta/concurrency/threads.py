"""Blocking work off the reactor thread, in a thread pool that is passed in."""

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
    """Returns a Deferred for the same outcome whose cancelling ends the wait and leaves ``work``
    alone.

    A thread cannot be cancelled. Without the shield, cancelling a wait would also lose the
    callbacks that keep our own state in step with what the thread did.
    """
    # Without a canceller it ignores results after it was cancelled.
    waiter: Deferred[T] = Deferred()
    work.addCallbacks(waiter.callback, waiter.errback)
    return waiter


class Threads:
    """Runs calls in the threads of a started pool. The pool's creator stops it, after all of its
    users.
    """

    def __init__(self, reactor: IReactorFromThreads, pool: ThreadPool) -> None:
        self.reactor = reactor
        self._pool = pool

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Queues a call. Its callbacks run even when waits are cancelled: do not hand the Deferred
        out.
        """
        return deferToThreadPool(self.reactor, self._pool, function, *args, **kwargs)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call in a thread and returns its outcome. Cancelling ends the wait; the call
        itself runs to its end.
        """
        return await shielded(self.start(function, *args, **kwargs))

    def soon(self, function: Callable[[], object]) -> None:
        """Calls in the reactor thread, in its next iteration; other events come in between."""
        self.reactor.callFromThread(function)
