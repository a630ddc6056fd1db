"""Enforces the quota: whenever the store has grown, and after a write to a full disk. Also admits
builds and checks readiness.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from obdelta.concurrency.tasks import Waiters
from obdelta.errors import QuotaUsedUp
from obdelta.store import files, ownership
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import Cache
from obdelta.store.lock import StateLock
from obdelta.store.quota import EXCESS_SECONDS, Quota, Reclaimed, StoredDeltas

log = Logger()

Count = Callable[[str, int], Awaitable[None]]

MIN_FREED = 64 << 20
"""Bytes freed at least when the disk is full: less would not last for one build."""
WAIT_SECONDS = 0.5
"""Seconds after which a build that waits for room looks again."""
FULL_DISK_SHARE = 4
"""On a full disk, all content divided by this number is evicted, least recently used first."""


class QuotaService:
    """Runs ``quota``; ``count(name, n)`` raises counters. Lives on the reactor thread."""

    def __init__(
        self,
        quota: Quota,
        blobs: BlobStore,
        count: Count,
        *,
        folders: Sequence[Path] = (),
        catalogue: Path | None = None,
        lock: StateLock | None = None,
        deltas: StoredDeltas | None = None,
        ceiling: int = 0,
        clock: IReactorTime | None = None,
    ) -> None:
        """``folders`` are checked for readiness, and recreated; ``catalogue`` is the file that must
        still exist, and so must that of ``lock``.

        ``ceiling``: bytes of ``deltas`` at which no new build starts. If there is a ``clock``,
        builds wait by it until the excess of a fleet may be removed.
        """
        self._clock = clock
        self._deltas, self._ceiling = deltas, ceiling
        self._quota, self._blobs, self._count = quota, blobs, count
        self._folders, self._lock = folders, lock
        self._catalogue = None if catalogue is None else (catalogue, _identity(catalogue))
        self._running: Deferred[None] | None = None
        self._rerun = False
        self._full, self._over = False, 0
        self._settling: Waiters[None] = Waiters()

    def grew(self) -> None:
        """Schedules a run of the quota after content was added. Many calls at once cause one
        run.
        """
        if self._running is not None:
            self._rerun = True
            return
        self._running = ensureDeferred(self._reclaim())
        self._running.addErrback(
            lambda failure: log.failure("the quota was not enforced", failure)
        ).addBoth(self._ended)

    def watch(self, cache: Cache[Any]) -> None:
        """Evicts from a cache whenever the store has grown, and on a full disk."""
        cache.on_growth = self.grew
        cache.on_release = self._released
        cache.make_room = self._quota.make_room

    def _released(self) -> None:
        """Continues a run that had to leave content because it was in use."""
        if self._over:
            self.grew()

    def _ended(self, _outcome: None) -> None:
        self._running = None
        if self._rerun:
            self._rerun = False
            self.grew()
        self._settling.fire(None)

    async def _reclaim(self) -> None:
        done = await self._quota.reclaim()
        if done.freed:
            log.info("quota: {freed} bytes were evicted", freed=done.freed)
            await self._count("store.reclaimed_bytes", done.freed)
        if done.over and not self._over:
            log.warn(
                "quota: {over} bytes above store-quota stay: they are in use, or were served within"
                " keep-served: raise store-quota if this happens often",
                over=done.over,
            )
        self._over = done.over

    async def usage(self) -> dict[str, int]:
        """Returns the bytes of each kind of content."""
        return await self._quota.usage()

    async def collect(self, wanted: int = 0) -> Reclaimed:
        """Enforces the quota now; then frees the rest of ``wanted`` bytes regardless of the quota.

        Content in use, or served within ``keep-served``, stays.
        """
        done = await self._quota.reclaim()
        freed = done.freed
        if freed < wanted:
            freed += await self._quota.make_room(wanted - freed)
        if freed:
            log.info("gc: {freed} bytes were evicted", freed=freed)
            await self._count("store.reclaimed_bytes", freed)
        return Reclaimed(freed, await self._quota.usage(), done.over)

    async def make_room(self) -> bool:
        """After a write to a full disk, evicts the least recently used content. Returns whether
        there is space again.
        """
        self._full = True
        kept = sum((await self._quota.usage()).values())
        freed = await self._quota.make_room(max(MIN_FREED, kept // FULL_DISK_SHARE))
        log.warn(
            "the disk is full: {freed} of {kept} stored bytes were evicted", freed=freed, kept=kept
        )
        room = await self._blobs.has_free_space()
        self._full = not room
        await self._count("store.full", 1)
        if freed:
            await self._count("store.reclaimed_bytes", freed)
        return room

    async def admit(self) -> None:
        """Checks before a new build. Raises QuotaUsedUp if deltas that must stay take the whole
        quota.

        The output of running builds may still exceed it. Caches do not count, since they can be
        evicted. The excess of a fleet may go within seconds: the build waits for that, as a refused
        client would ask again only much later.
        """
        waits = int(EXCESS_SECONDS / WAIT_SECONDS) + 4
        while (kept := await self._above_ceiling()) and self._deltas is not None:
            if await self._deltas.drop_oldest():
                continue
            if not waits or self._clock is None or not await self._deltas.has_excess():
                raise QuotaUsedUp(kept, self._ceiling)
            waits -= 1
            await deferLater(self._clock, WAIT_SECONDS)

    async def _above_ceiling(self) -> int:
        """Returns the bytes of deltas if they still reach the ceiling after all possible evictions;
        else 0.
        """
        if self._deltas is None or await self._deltas.usage() < self._ceiling:
            return 0
        await self._quota.reclaim(1)  # exactly full is full, too
        kept = await self._deltas.usage()
        return kept if kept >= self._ceiling else 0

    async def problem(self) -> str | None:
        """Returns why nothing can be stored now, or None if all is well (readiness)."""
        problem = await self._blobs.threads.run(self._folder_problem)
        if problem is not None:
            return problem
        if not await self._blobs.writable():
            return "the store cannot be written"
        kept = await self._above_ceiling()
        if kept and self._deltas is not None and not await self._deltas.can_drop():
            return str(QuotaUsedUp(kept, self._ceiling))
        await self._quota.usage()  # reads the catalogue
        if self._full and not await self._blobs.has_free_space():
            return "the disk is full"
        self._full = False
        return None

    def _folder_problem(self) -> str | None:
        """Returns what is wrong with the directories in ``state-dir``, or None. Blocking."""
        if self._catalogue is not None and _identity(self._catalogue[0]) != self._catalogue[1]:
            return "catalogue.sqlite was removed from state-dir, or replaced: restart obdelta"
        if self._lock is not None and (problem := self._lock.problem()) is not None:
            return problem
        for folder in self._folders:
            try:
                ownership.make_folder(folder)
                if not files.has_free_inodes(folder):
                    return "the disk is full: no inode is left"
                if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                    return (
                        f"{folder.name}/ in state-dir cannot be written: check its owner and mode"
                    )
            except OSError as error:
                return f"{folder.name}/ in state-dir cannot be used: {error.strerror}"
        return None

    async def wait_until_idle(self) -> None:
        """Waits until no quota run is active. Call it before closing what the runs use."""
        while self._running is not None:
            await self._settling.wait()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
