"""Build attempts and retries: runs builds in bounded time, and decides which failures a retry may
cure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.rebuild import Rebuild, Rebuilder
from obdelta.builds.types import Builder, Grows, Pair, Report
from obdelta.errors import (
    BuildTimedOut,
    ProgramUnusable,
    ProofFailed,
    QuotaUsedUp,
    StoreFailed,
    StoreFull,
    WorkerFailed,
)
from obdelta.registry import Credentials
from obdelta.store import files
from obdelta.store.catalogue.records import DeltaRow

log = Logger()

Count = Callable[[str], Awaitable[None]]


class Attempts:
    """Runs attempts of builds within ``seconds`` each, and a second one that saves memory where
    that may help.

    A worker that died or ran out of memory may manage with less. A proof may have failed because of
    a cached layer, and is repeated with fresh ones. A full disk is retried once ``make_room`` has
    made room. A file that was removed during a build is rebuilt. A build that ran out of time is
    not retried: it would do so again.
    """

    def __init__(
        self,
        clock: IReactorTime,
        seconds: float,
        make_room: Callable[[], Awaitable[bool]],
        count: Count,
        admit: Callable[[], Awaitable[None]],
    ) -> None:
        """``admit`` raises QuotaUsedUp where no new build may begin."""
        self._clock, self._seconds, self._make_room, self._count = clock, seconds, make_room, count
        self._admit = admit

    async def build(
        self,
        builder: Builder,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        grows: Grows,
        *,
        low_memory: bool,
    ) -> DeltaRow:
        """Runs one attempt; ``low_memory`` marks the second one."""
        await self._admit()
        work = ensureDeferred(
            _clear(pair, builder.build(pair, credentials, report, grows, low_memory=low_memory))
        )
        return await work.addTimeout(self._seconds, self._clock, onTimeoutCancel=_took_too_long)

    async def may_help(
        self, pair: Pair, error: StoreFull | StoreFailed | WorkerFailed | ProofFailed
    ) -> bool:
        """Returns whether a second attempt may succeed after this failure, and then counts it."""
        if isinstance(error, BuildTimedOut | ProgramUnusable | QuotaUsedUp):
            return False
        if isinstance(error, StoreFull) and not await self._make_room():
            return False
        log.warn("build of {pair} is tried once more: {reason}", pair=str(pair), reason=str(error))
        await self._count("build.retried")
        return True

    async def build_again(
        self,
        rebuilder: Rebuilder,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        rebuild: Rebuild,
    ) -> DeltaRow:
        """Runs one attempt only: devices read its bytes already, and retry by themselves."""
        await self._count("delta.again")
        work = ensureDeferred(
            _clear(pair, rebuilder.build_again(pair, credentials, report, rebuild))
        )
        return await work.addTimeout(self._seconds, self._clock, onTimeoutCancel=_took_too_long)


async def _clear(pair: Pair, build: Coroutine[Deferred[Any], Any, DeltaRow]) -> DeltaRow:
    """Turns errors of the file system during a build into errors of the store."""
    try:
        return await build
    except OSError as error:
        log.warn(
            "build of {pair}: the store gave an error: {reason}",
            pair=str(pair),
            reason=files.described(error),
        )
        raise files.translated(error) from error


def _took_too_long(result: object, seconds: float) -> DeltaRow:
    if isinstance(result, DeltaRow):
        return result
    raise BuildTimedOut(f"the build took more than {seconds:g} seconds")
