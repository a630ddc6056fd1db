"""Runs a coroutine on Twisted's reactor for a command. Ctrl-C cancels it and
waits for its cleanup.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from twisted.internet import task
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import ReactorNotRunning
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.app.state import Closers
from obdelta.concurrency.clock import use_monotonic_time
from obdelta.concurrency.threads import Threads

T = TypeVar("T")

_THREADS = 4
_ENDING = (signal.SIGINT, signal.SIGTERM)


def run(main: Callable[[Any, Threads, Closers], Coroutine[Deferred[Any], Any, T]]) -> T:
    """Returns or raises the outcome of ``main(reactor, threads, closers)``.

    After an interrupt it raises KeyboardInterrupt, or SystemExit with the status for SIGTERM. In
    any case the functions that ``main`` appended to ``closers`` run in the reverse order. Call it
    once a process.
    """
    outcomes: list[T | Failure] = []
    signals: list[int] = []

    def started(reactor: Any) -> Deferred[None]:
        use_monotonic_time(reactor)
        done = ensureDeferred(_with_closers(main, reactor))

        def stopping() -> Deferred[None] | None:
            # Runs before the reactor stops, here because of a signal. The reactor waits for the
            # returned Deferred.
            if outcomes:
                return None
            tidied: Deferred[None] = Deferred()
            ended.append(tidied)
            done.cancel()
            return tidied

        def finished(outcome: T | Failure) -> None:
            outcomes.append(outcome)
            for waiter in ended:
                waiter.callback(None)

        ended: list[Deferred[None]] = []
        reactor.callWhenRunning(
            _stop_once, reactor, signals.append
        )  # by then Twisted has installed its own handlers
        reactor.addSystemEventTrigger("before", "shutdown", stopping)
        return done.addBoth(finished)

    with suppress(SystemExit):  # react always ends so; the outcome counts
        task.react(started)
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    if not outcomes:
        raise KeyboardInterrupt  # it came before the reactor ran
    if isinstance(outcomes[0], Failure):
        outcomes[0].raiseException()
    return outcomes[0]


def _stop_once(reactor: Any, noted: Callable[[int], None]) -> None:
    """Makes both signals stop the reactor. Later signals do not interrupt the cleanup."""

    def caught(number: int, _frame: object) -> None:
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        noted(number)
        reactor.callFromThread(stop)

    def stop() -> None:
        with suppress(ReactorNotRunning):  # it is already stopping
            reactor.stop()

    for number in _ENDING:
        signal.signal(number, caught)


async def _with_closers(main: Callable[[Any, Threads, Closers], Awaitable[T]], reactor: Any) -> T:
    pool = ThreadPool(1, _THREADS, "obdelta")
    pool.start()
    closers: Closers = []
    try:
        return await main(reactor, Threads(reactor, pool), closers)
    finally:
        try:
            for close in reversed(closers):
                await close()
        finally:
            pool.stop()
