"""Shared parts of every server process: settings, reactor, threads, metrics, and the services that
stop with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.logger import Logger

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.observability import Metrics
from obdelta.settings import Settings

log = Logger()


class Services(MultiService):
    """Services that stop one after another, the last one first: each may use earlier ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Twisted's

    def startService(self) -> None:
        """Starts all services."""
        super().startService()  # type: ignore[no-untyped-call] # Twisted's

    def add_stop(self, stop: Callable[[], Awaitable[object] | None]) -> None:
        """Adds a service whose only work is to stop."""
        _Stop(stop).setServiceParent(self)  # type: ignore[no-untyped-call] # Twisted's

    def stopService(self) -> Deferred[None]:
        """Stops all services, also after a failure. Fails with the first failure."""
        Service.stopService(self)
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        first: Exception | None = None
        for service in reversed(list(self)):
            try:
                await maybeDeferred(service.stopService)
            except Exception as error:  # a full disk, for example: the others are stopped anyway
                if first is not None:
                    log.failure("a part of the server did not stop cleanly")
                first = first or error
        if first is not None:
            raise first


class _Stop(Service):
    def __init__(self, stop: Callable[[], Awaitable[object] | None]) -> None:
        self._stop = stop

    def stopService(self) -> Deferred[object]:
        """Calls the function."""
        super().stopService()  # type: ignore[no-untyped-call] # Twisted's
        return maybeDeferred(self._stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The base of a process. Whatever must be closed is added to ``services`` when it is opened."""

    settings: Settings
    reactor: IReactor
    threads: Threads
    metrics: Metrics
    services: Services
