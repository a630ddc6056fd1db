"""What is deleted once it is of no use any more: failures of builds."""

from __future__ import annotations

import time
from typing import Any

from twisted.internet.defer import ensureDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.builds.coordinator import NOT_WORTH_MEMORY
from obdelta.errors import Unavailable
from obdelta.settings import Settings
from obdelta.store.catalogue import Catalogue
from obdelta.web.pages.live import FAILURE_SECONDS
from obdelta.wiring.state import Closers

log = Logger()

EVERY = 3600.0
"""Seconds."""


def expire_failures(configured: Settings, reactor: Any, catalogue: Catalogue, closers: Closers) -> None:
    """Deletes failures that neither answer for a pair nor are shown any more: now, and once an hour."""
    memory = int(max(FAILURE_SECONDS, NOT_WORTH_MEMORY, configured.failure_memory))

    async def expire() -> None:
        try:
            count = await catalogue.expire_failures(int(time.time()), memory)
        except Unavailable as error:
            log.warn("old failures of builds were not deleted: {reason}", reason=str(error))
        else:
            if count:
                log.info("{count} old failures of builds were deleted", count=count)

    timer = LoopingCall(lambda: ensureDeferred(expire()))
    timer.clock = reactor

    async def stop() -> None:
        timer.stop()

    closers.append(stop)
    timer.start(EVERY).addErrback(lambda failure: log.failure("old failures of builds were not deleted", failure))
