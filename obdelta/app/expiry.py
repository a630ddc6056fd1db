"""Periodic deletion of build failures that are no longer needed."""

from __future__ import annotations

import time
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
"""Seconds between two deletions."""


def expire_failures(
    configured: Settings, reactor: Any, catalogue: Catalogue, closers: Closers
) -> None:
    """Deletes failures that no longer answer for a pair and are no longer displayed: now, and then
    once an hour.
    """
    memory = int(max(FAILURE_SECONDS, TOO_LARGE_MEMORY, configured.failure_memory))

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
    timer.start(EVERY).addErrback(
        lambda failure: log.failure("old failures of builds were not deleted", failure)
    )
