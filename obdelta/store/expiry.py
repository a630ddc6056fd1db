"""Hourly maintenance of the catalogue: expired rows are deleted, and times ahead of the clock are
corrected.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from twisted.application.internet import TimerService
from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.errors import Unavailable
from obdelta.store.catalogue.catalogue import Catalogue

log = Logger()

EVERY = 3600.0
"""Seconds."""
MAX_DRIFT = 60.0
"""Seconds by which the system's clock may deviate from a monotonic one within an hour."""


class Expiry:
    """One pass an hour. ``now`` is the time of day, ``monotonic`` a monotonic clock.

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
        monotonic: Callable[[], float],
    ) -> None:
        self._catalogue, self._failure_memory = catalogue, failure_memory
        self._now, self._monotonic = now, monotonic
        self._last: tuple[float, float] | None = None

    async def run(self) -> None:
        """Corrects stored times; deletes what has expired, if the clock was steady."""
        now, monotonic = self._now(), self._monotonic()
        last, self._last = self._last, (now, monotonic)
        try:
            await self._catalogue.correct_times(int(now))
            if last is None:
                return
            drift = (now - last[0]) - (monotonic - last[1])
            if abs(drift) > MAX_DRIFT:
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


def make_expiry(
    clock: IReactorTime,
    catalogue: Catalogue,
    failure_memory: int,
    now: Callable[[], float] = time.time,
) -> TimerService:
    """Returns the service that makes the passes: one when it starts, then one an hour.
    ``failure_memory``: the seconds for which anyone needs a failure.
    """
    expiry = Expiry(catalogue, failure_memory, now, clock.seconds)
    service = TimerService(EVERY, lambda: ensureDeferred(expiry.run()))
    service.clock = clock
    return service
