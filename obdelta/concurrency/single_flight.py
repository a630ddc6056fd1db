"""Concurrent coroutines: waits for several, runs one as a task, shares one call between many
waiters.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.python.failure import Failure

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


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
    """A coroutine of its own: a client may stop waiting for it, and wait again. The creator ends it
    with :meth:`end`.
    """

    def __init__(self, coroutine: Coroutine[Deferred[Any], Any, T]) -> None:
        self._outcome: list[T | Failure] = []
        self._waiters: list[Deferred[None]] = []
        self._running = ensureDeferred(coroutine).addBoth(self._ended)

    def _ended(self, outcome: T | Failure) -> None:
        self._outcome.append(outcome)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(None)

    async def _over(self) -> None:
        if not self._outcome:
            waiter: Deferred[None] = Deferred(self._waiters.remove)
            self._waiters.append(waiter)
            await waiter

    async def result(self) -> T:
        """Returns or raises the coroutine's outcome. Cancelling ends the wait alone."""
        await self._over()
        outcome = self._outcome[0]
        if isinstance(outcome, Failure):
            outcome.raiseException()
        return outcome

    async def end(self) -> None:
        """Cancels the coroutine unless it has ended, and waits until it has. Its outcome is
        ignored.
        """
        if not self._outcome:
            self._running.cancel()
        await self._over()


@dataclass(slots=True, eq=False)
class _Work(Generic[T]):
    """The work under way for a key, and the clients that wait for it."""

    waiters: list[Deferred[T]] = field(default_factory=list)
    task: Deferred[None] | None = None


class Shared(Generic[K, T]):
    """Runs work once per key, however many clients want it at the same time.

    A client that stops waiting does not disturb the others. Work that no client waits for is
    cancelled. ``personal`` errors concern the client that began the work (its credentials, its
    repository). Other clients that meet one repeat the work themselves.
    """

    def __init__(self, personal: tuple[type[Exception], ...] = ()) -> None:
        self._personal = personal
        self._under_way: dict[K, _Work[T]] = {}

    async def do(self, key: K, start: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> T:
        """Returns the outcome of the work under way for the key; ``start`` begins it if there is
        none.
        """
        joined = self._under_way.get(key)
        if joined is not None:
            try:
                return await self._wait(key, joined, start)
            except self._personal:
                pass
        return await self._wait(key, self._under_way.get(key) or _Work(), start)

    async def _wait(
        self, key: K, work: _Work[T], start: Callable[[], Coroutine[Deferred[Any], Any, T]]
    ) -> T:
        mine: Deferred[T] = Deferred()
        work.waiters.append(mine)
        if work.task is None:
            self._under_way[key] = work
            # Its own task: cancelling a wait must not reach it. It may end at once, but finds its
            # waiter.
            work.task = ensureDeferred(start()).addBoth(self._ended, key, work)
        try:
            return await mine
        finally:
            work.waiters.remove(mine)
            if not work.waiters and self._forget(key, work):
                work.task.cancel()

    def _forget(self, key: K, work: _Work[T]) -> bool:
        """Keeps further clients from joining. Returns False where that was so already."""
        if self._under_way.get(key) is not work:
            return False
        del self._under_way[key]
        return True

    def _ended(self, outcome: T | Failure, key: K, work: _Work[T]) -> None:
        self._forget(key, work)
        for waiter in work.waiters[:]:
            if isinstance(outcome, Failure):
                waiter.errback(outcome)
            else:
                waiter.callback(outcome)
