"""Twisted's reactor: its type, as far as obdelta uses it, and monotonic time for its timers.

Two kinds of time are never mixed. ``reactor.seconds()``, and every ``clock.seconds()`` that is
handed on from it, counts seconds of a monotonic clock: for waiting, time-outs, back-off and
durations. ``time.time()``, handed on as ``now``, is the time of day: for stored or displayed values
and for comparison with tokens.
"""

from __future__ import annotations

import time

from twisted.internet.interfaces import (
    IReactorCore,
    IReactorFDSet,
    IReactorPluggableNameResolver,
    IReactorProcess,
    IReactorSocket,
    IReactorTCP,
    IReactorThreads,
    IReactorTime,
    IReactorUNIX,
)


class IReactor(
    IReactorCore,
    IReactorTime,
    IReactorThreads,
    IReactorProcess,
    IReactorTCP,
    IReactorUNIX,
    IReactorSocket,
    IReactorFDSet,
    IReactorPluggableNameResolver,
):
    """A reactor that sets timers, uses threads, starts processes and opens sockets.

    Functions that only need a clock take Twisted's ``IReactorTime``.
    """


def use_monotonic_time(reactor: IReactor) -> None:
    """Makes the reactor's timers independent of the system's clock.

    Twisted uses the time of day. After the clock is set back by an hour, every earlier timer fires
    an hour late. Twisted reads the time by this method alone. Call it before the reactor runs;
    timers that are set already keep their delay.
    """
    before, after = reactor.seconds(), time.monotonic()
    calls = [(call, call.getTime() - before) for call in reactor.getDelayedCalls()]
    reactor.seconds = time.monotonic  # type: ignore[method-assign]
    for call, left in calls:
        call.seconds = time.monotonic  # type: ignore[attr-defined] # of Twisted's own class
        call.reset(max(0.0, left - (time.monotonic() - after)))
