"""Doing several things at once under one coroutine."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.python.failure import Failure

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
