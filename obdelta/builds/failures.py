"""What a failed build gets a second attempt for, and what its failure says of the pair."""

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
    """Attempts of builds, within ``seconds`` each; a second one, which saves memory, where that may
    help.

    A worker that died or ran out of memory may live with less; a proof may have failed because of a
    cached layer, and is repeated with fresh ones; a full disk, once ``make_room`` has made room. A
    file that was removed under a build is made again. A build that ran out of time would do so
    again.
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
        """One attempt; ``low_memory``: the second one."""
        await self._admit()
        work = ensureDeferred(
            _clear(pair, builder.build(pair, credentials, report, grows, low_memory=low_memory))
        )
        return await work.addTimeout(self._seconds, self._clock, onTimeoutCancel=_took_too_long)

    async def may_help(
        self, pair: Pair, error: StoreFull | StoreFailed | WorkerFailed | ProofFailed
    ) -> bool:
        """Whether a second attempt may succeed where the first one failed so; counts it then."""
        if isinstance(error, BuildTimedOut | ProgramUnusable | QuotaUsedUp):
            return False
        if isinstance(error, StoreFull) and not await self._make_room():
            return False
        log.warn("build of {pair} is tried once more: {reason}", pair=str(pair), reason=str(error))
        await self._count("build.retried")
        return True

    async def build_again(
        self,
        remaker: Rebuilder,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        again: Rebuild,
    ) -> DeltaRow:
        """One attempt: devices read its bytes already, and ask again by themselves."""
        await self._count("delta.again")
        work = ensureDeferred(_clear(pair, remaker.build_again(pair, credentials, report, again)))
        return await work.addTimeout(self._seconds, self._clock, onTimeoutCancel=_took_too_long)


async def _clear(pair: Pair, build: Coroutine[Deferred[Any], Any, DeltaRow]) -> DeltaRow:
    """Whatever the file system does to a build is an error of the store."""
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
