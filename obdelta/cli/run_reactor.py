"""A coroutine on Twisted's reactor, for as long as a command runs; Ctrl-C calls it off and lets it
tidy up.
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
    """What ``main(reactor, threads, closers)`` returns or raises; when it was interrupted,
    KeyboardInterrupt, or SystemExit with the status that stands for SIGTERM.

    What it puts among the closers is called in the reverse order in the end, however it ends. Once
    a process.
    """
    outcomes: list[T | Failure] = []
    signals: list[int] = []

    def started(reactor: Any) -> Deferred[None]:
        use_monotonic_time(reactor)
        done = ensureDeferred(_with_closers(main, reactor))

        def stopping() -> Deferred[None] | None:
            # Before the reactor stops: by a signal where we have not ended yet. It waits for what
            # is returned.
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
        )  # by then Twisted has put its own functions there
        reactor.addSystemEventTrigger("before", "shutdown", stopping)
        return done.addBoth(finished)

    with suppress(SystemExit):  # react always ends so; what counts is the outcome
        task.react(started)
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    if not outcomes:
        raise KeyboardInterrupt  # it came before the reactor ran
    if isinstance(outcomes[0], Failure):
        outcomes[0].raiseException()
    return outcomes[0]


def _stop_once(reactor: Any, told: Callable[[int], None]) -> None:
    """Both signals stop the reactor; further ones leave the tidying up alone."""

    def caught(number: int, _frame: object) -> None:
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        told(number)
        reactor.callFromThread(stop)

    def stop() -> None:
        with suppress(ReactorNotRunning):  # it is about to end by itself
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
