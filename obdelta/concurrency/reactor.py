"""The type of Twisted's reactor, as far as obdelta uses it."""

from __future__ import annotations

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
