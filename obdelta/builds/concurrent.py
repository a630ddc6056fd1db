"""Doing several things at once under one coroutine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.python.failure import Failure

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def settle(coroutines: Iterable[Coroutine[Deferred[Any], Any, T]]) -> list[T | Failure]:
    """Run coroutines at the same time; the first failure cancels the others. Results in order, failures among them.

    All have ended when this returns, so that whoever owns their pins and temporary files can tidy up.
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
    """The failure to tell: one that is not just the echo of a cancellation, where there is such a one."""
    failures = [result for result in results if isinstance(result, Failure)]
    return next(
        (failure for failure in failures if not failure.check(CancelledError)), failures[0] if failures else None
    )


class Shared(Generic[K, T]):
    """Work by key that is done once however many want it at the same time; who stops waiting takes it from nobody."""

    def __init__(self) -> None:
        self._waiting: dict[K, list[Deferred[T]]] = {}

    async def do(self, key: K, start: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> T:
        """The outcome of the work that is under way for the key, which ``start`` begins if there is none."""
        mine: Deferred[T] = Deferred()
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(mine)
        else:
            self._waiting[key] = [mine]
            # Its own task: cancelling a wait must not reach it.
            ensureDeferred(start()).addBoth(self._ended, key)
        return await mine

    def _ended(self, outcome: T | Failure, key: K) -> None:
        for waiter in self._waiting.pop(key):
            if waiter.called:
                continue
            if isinstance(outcome, Failure):
                waiter.errback(outcome)
            else:
                waiter.callback(outcome)
