"""Events, tasks, shared calls and calls in threads: any number of coroutines wait for one, and
each wait can be cancelled alone.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

K = TypeVar("K", bound=Hashable)
P = ParamSpec("P")
T = TypeVar("T")


class Waiters(Generic[T]):
    """The waits for the next time that something happens. It may happen many times."""

    def __init__(self) -> None:
        self._waiting: dict[Deferred[T], None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self) -> Deferred[T]:
        """Returns a Deferred that fires the next time. Cancelling it ends this wait only."""
        waiter: Deferred[T] = Deferred(lambda waiter: self._waiting.pop(waiter, None))
        self._waiting[waiter] = None
        return waiter

    def fire(self, outcome: T | Failure) -> None:
        """Ends the waits that have begun. Waits that begin meanwhile are for the next time."""
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting:
            if not waiter.called:  # cancelled by one that fired before it
                waiter.callback(outcome)


class Event:
    """Something that happens once. Waits that begin later end at once."""

    def __init__(self) -> None:
        self._waiters: Waiters[None] = Waiters()
        self.happened = False

    @property
    def waiting(self) -> int:
        """The number of waits that have not ended."""
        return len(self._waiters)

    def wait(self) -> Deferred[None]:
        """Returns a Deferred that fires once the event has happened. Cancelling it ends this wait
        only.
        """
        return succeed(None) if self.happened else self._waiters.wait()

    def fire(self) -> None:
        """Makes the event happen. Without effect if it has happened."""
        self.happened = True
        self._waiters.fire(None)


async def settle(coroutines: Iterable[Coroutine[Deferred[Any], Any, T]]) -> list[T | Failure]:
    """Runs coroutines concurrently; the first failure cancels the others. Returns results and
    failures in order.

    All have ended when this returns, so that the caller can release its pins and remove its
    temporary files.
    """
    started: list[Deferred[T]] = [ensureDeferred(coroutine) for coroutine in coroutines]
    failed = False

    def on_failure(failure: Failure) -> Failure:
        nonlocal failed
        if not failed:
            failed = True
            for other in started:
                other.cancel()
        return failure

    for deferred in started:
        deferred.addErrback(on_failure)
    results = await DeferredList(started, consumeErrors=True)
    return [result for _, result in results]


def first_failure(results: Iterable[object]) -> Failure | None:
    """Returns the failure to report: the first that is not a mere consequence of cancelling, else
    the first.
    """
    failures = [result for result in results if isinstance(result, Failure)]
    return next(
        (failure for failure in failures if not failure.check(CancelledError)),
        failures[0] if failures else None,
    )


class Task(Generic[T]):
    """A coroutine that runs on its own. Any number of clients wait for its result, and each may
    stop waiting.
    """

    def __init__(self, coroutine: Coroutine[Deferred[Any], Any, T]) -> None:
        self._outcome: T | Failure | None = None
        self._end = Event()
        self._running = ensureDeferred(coroutine).addBoth(self._finish)

    def _finish(self, outcome: T | Failure) -> None:
        self._outcome = outcome
        self._end.fire()

    @property
    def ended(self) -> bool:
        """Whether the coroutine has ended."""
        return self._end.happened

    @property
    def waiting(self) -> int:
        """The number of clients that wait for the result."""
        return self._end.waiting

    async def result(self) -> T:
        """Returns or raises the coroutine's outcome. Cancelling ends the wait alone."""
        await self._end.wait()
        if isinstance(self._outcome, Failure):
            self._outcome.raiseException()
        return cast(T, self._outcome)

    def cancel(self) -> None:
        """Cancels the coroutine. Without effect if it has ended."""
        if not self.ended:
            self._running.cancel()

    async def end(self) -> None:
        """Cancels the coroutine, and waits until it has ended. Its outcome is ignored."""
        self.cancel()
        await self._end.wait()


class SingleFlight(Generic[K, T]):
    """Runs work once per key, however many clients want it at the same time.

    A client that stops waiting does not disturb the others. Work that no client waits for is
    cancelled. ``personal`` errors concern the client that began the work (its credentials, its
    repository). After a personal error, the other clients repeat the work themselves.
    """

    def __init__(self, personal: tuple[type[Exception], ...] = ()) -> None:
        self._personal = personal
        self._flights: dict[K, Task[T]] = {}

    async def do(self, key: K, start: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> T:
        """Returns the outcome of the work under way for the key; ``start`` begins it if there is
        none.
        """
        joined = self._flights.get(key)
        if joined is not None:
            try:
                return await self._result(key, joined)
            except self._personal:
                pass
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Task(start())
        return await self._result(key, flight)

    async def _result(self, key: K, flight: Task[T]) -> T:
        try:
            return await flight.result()
        finally:
            # The first client to learn of its end, or the last one to leave.
            if not flight.waiting and self._flights.get(key) is flight:
                del self._flights[key]
                flight.cancel()


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
    """Runs blocking calls in the threads of a started pool. The pool's creator stops it, after all
    of its users.
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
