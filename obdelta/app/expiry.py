"""Hourly care of the catalogue: expired rows are deleted, times ahead of the clock corrected."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import ensureDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.app.state import Closers
from obdelta.builds.service import TOO_LARGE_MEMORY
from obdelta.errors import Unavailable
from obdelta.settings import Settings
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.web.operators.pages.live_pages import FAILURE_SECONDS

log = Logger()

EVERY = 3600.0
"""Seconds."""
MOST_DRIFT = 60.0
"""Seconds by which the system's clock may deviate from a monotonic one within an hour."""


class Expiry:
    """One pass an hour. ``now`` is the time of day, ``steady`` a monotonic clock.

    A clock that jumped ahead makes every row look old. So rows are deleted only after the time of
    day has kept pace with the monotonic clock for an hour: by then a time server has corrected a
    jump, or there was none. This needs no second source of time. Nothing is deleted at a start,
    as nothing is known of the clock then. A clock that stays wrong longer costs a part of each
    table an hour (:func:`obdelta.store.catalogue.stored_times.expire`).
    """

    def __init__(
        self,
        catalogue: Catalogue,
        failure_memory: int,
        now: Callable[[], float],
        steady: Callable[[], float],
    ) -> None:
        self._catalogue, self._failure_memory = catalogue, failure_memory
        self._now, self._steady = now, steady
        self._last: tuple[float, float] | None = None

    async def run(self) -> None:
        """Corrects stored times; deletes what has expired, if the clock was steady."""
        now, steady = self._now(), self._steady()
        last, self._last = self._last, (now, steady)
        try:
            await self._catalogue.correct_times(int(now))
            if last is None:
                return
            drift = (now - last[0]) - (steady - last[1])
            if abs(drift) > MOST_DRIFT:
                log.warn(
                    "the system's clock jumped by {drift} s: expired rows are kept for another"
                    " hour: check the clock",
                    drift=round(drift),
                )
                return
            gone = await self._catalogue.expire(int(now), self._failure_memory)
        except Unavailable as error:
            log.warn("expired rows were not deleted: {reason}", reason=str(error))
            return
        if any(gone.values()):
            log.info(
                "expired rows were deleted: {rows}",
                rows=", ".join(f"{count} of {table}" for table, count in gone.items() if count),
            )


def start_expiry(
    configured: Settings,
    reactor: Any,
    catalogue: Catalogue,
    closers: Closers,
    now: Callable[[], float] = time.time,
) -> None:
    """Starts the passes: one now, then one an hour."""
    memory = int(max(FAILURE_SECONDS, TOO_LARGE_MEMORY, configured.failure_memory))
    expiry = Expiry(catalogue, memory, now, reactor.seconds)
    timer = LoopingCall(lambda: ensureDeferred(expiry.run()))
    timer.clock = reactor

    async def stop() -> None:
        timer.stop()

    closers.append(stop)
    timer.start(EVERY).addErrback(
        lambda failure: log.failure("expired rows were not deleted", failure)
    )
