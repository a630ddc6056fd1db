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

from obdelta.app.runtime import Runtime, Services
from obdelta.concurrency.reactor import IReactor, use_monotonic_time
from obdelta.concurrency.tasks import Event, Threads
from obdelta.observability import Metrics
from obdelta.settings import Settings

T = TypeVar("T")

_THREADS = 4
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(configured: Settings, main: Callable[[Runtime], Coroutine[Deferred[Any], Any, T]]) -> T:
    """Returns or raises the outcome of ``main``.

    After an interrupt it raises KeyboardInterrupt, or SystemExit with the status for SIGTERM. In
    any case the services of ``main``'s runtime stop, the last one first. Call it once a process.
    """
    outcomes: list[T | Failure] = []
    signals: list[int] = []

    def started(reactor: IReactor) -> Deferred[None]:
        use_monotonic_time(reactor)
        done = ensureDeferred(_with_services(configured, main, reactor))

        def stopping() -> Deferred[None] | None:
            # Runs before the reactor stops, here because of a signal. The reactor waits for the
            # returned Deferred.
            if outcomes:
                return None
            cleaned_up = ended.wait()
            done.cancel()
            return cleaned_up

        def finished(outcome: T | Failure) -> None:
            outcomes.append(outcome)
            ended.fire()

        ended = Event()
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


def _stop_once(reactor: IReactor, on_signal: Callable[[int], None]) -> None:
    """Makes both signals stop the reactor. Later signals do not interrupt the cleanup."""

    def handle(number: int, _frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        on_signal(number)
        reactor.callFromThread(stop)

    def stop() -> None:
        with suppress(ReactorNotRunning):  # it is already stopping
            reactor.stop()

    for each in _SIGNALS:
        signal.signal(each, handle)


async def _with_services(
    configured: Settings, main: Callable[[Runtime], Awaitable[T]], reactor: IReactor
) -> T:
    pool = ThreadPool(1, _THREADS, "obdelta")
    pool.start()
    services = Services()
    services.startService()
    runtime = Runtime(
        settings=configured,
        reactor=reactor,
        threads=Threads(reactor, pool),
        metrics=Metrics(),
        services=services,
    )
    try:
        return await main(runtime)
    finally:
        try:
            await services.stopService()
        finally:
            pool.stop()
