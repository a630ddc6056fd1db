"""Enforces the quota: whenever the store has grown, and after a write to a full disk. Also admits
builds and checks readiness.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import Logger

from obdelta.errors import QuotaUsedUp
from obdelta.store import files, ownership
from obdelta.store.blobs import BlobStore
from obdelta.store.lock import StateLock
from obdelta.store.quota import DeltaShelf, Reclaimed, Retention

log = Logger()

Count = Callable[[str, int], Awaitable[None]]

LEAST_ROOM = 64 << 20
"""Bytes freed at least when the disk is full: less would not last for one build."""
ROOM_SHARE = 4
"""On a full disk, one part in so many of all content is evicted, least recently used first."""


class Upkeep:
    """Runs ``retention``; ``count(name, n)`` raises counters. Lives on the reactor thread."""

    def __init__(
        self,
        retention: Retention,
        blobs: BlobStore,
        count: Count,
        *,
        folders: Sequence[Path] = (),
        catalogue: Path | None = None,
        lock: StateLock | None = None,
        deltas: DeltaShelf | None = None,
        ceiling: int = 0,
    ) -> None:
        """``folders`` are checked for readiness, and recreated; ``catalogue`` is the file that must
        still exist, and so must that of ``lock``.

        ``ceiling``: bytes of ``deltas`` at which no new build starts.
        """
        self._deltas, self._ceiling = deltas, ceiling
        self._retention, self._blobs, self._count = retention, blobs, count
        self._folders, self._lock = folders, lock
        self._catalogue = None if catalogue is None else (catalogue, _identity(catalogue))
        self._running: Deferred[None] | None = None
        self._run_again = False
        self._full = False
        self._settling: list[Deferred[None]] = []

    def grew(self) -> None:
        """Schedules a run of the quota after content was added. Many calls at once cause one
        run.
        """
        if self._running is not None:
            self._run_again = True
            return
        self._running = ensureDeferred(self._reclaim())
        self._running.addErrback(
            lambda failure: log.failure("enforcing the quota", failure)
        ).addBoth(self._ended)

    def _ended(self, _outcome: None) -> None:
        self._running = None
        if self._run_again:
            self._run_again = False
            self.grew()
        settling, self._settling = self._settling, []
        for waiter in settling:
            waiter.callback(None)

    async def _reclaim(self) -> None:
        done = await self._retention.reclaim()
        if done.freed:
            log.info("quota: {freed} bytes went", freed=done.freed)
            await self._count("store.reclaimed_bytes", done.freed)
        if done.over:
            log.warn(
                "quota: {over} bytes above it are in use, or were served within the grace",
                over=done.over,
            )

    async def usage(self) -> dict[str, int]:
        """Returns the bytes of each kind of content."""
        return await self._retention.usage()

    async def collect(self, wanted: int = 0) -> Reclaimed:
        """Enforces the quota now; then frees the rest of ``wanted`` bytes regardless of the quota.

        Content in use, or served within the grace period, stays.
        """
        done = await self._retention.reclaim()
        freed = done.freed
        if freed < wanted:
            freed += await self._retention.make_room(wanted - freed)
        if freed:
            log.info("collected: {freed} bytes went", freed=freed)
            await self._count("store.reclaimed_bytes", freed)
        return Reclaimed(freed, await self._retention.usage(), done.over)

    async def make_room(self) -> bool:
        """After a write to a full disk, evicts the least recently used content. Returns whether
        there is space again.
        """
        self._full = True
        kept = sum((await self._retention.usage()).values())
        freed = await self._retention.make_room(max(LEAST_ROOM, kept // ROOM_SHARE))
        log.warn(
            "the disk is full: {freed} of {kept} bytes that were kept went", freed=freed, kept=kept
        )
        room = await self._blobs.has_room()
        self._full = not room
        await self._count("store.full", 1)
        if freed:
            await self._count("store.reclaimed_bytes", freed)
        return room

    async def admit(self) -> None:
        """Checks before a new build. Raises QuotaUsedUp if deltas that must stay take the whole
        quota.

        The output of running builds may still exceed it. Caches do not count, since they can be
        evicted.
        """
        while (kept := await self._above_ceiling()) and self._deltas is not None:
            if not await self._deltas.drop_oldest():
                raise QuotaUsedUp(kept, self._ceiling)

    async def _above_ceiling(self) -> int:
        """Returns the bytes of deltas if they still reach the ceiling after all possible evictions;
        else 0.
        """
        if self._deltas is None or await self._deltas.usage() < self._ceiling:
            return 0
        await self._retention.reclaim()
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
        await self._retention.usage()  # reads the catalogue
        if self._full and not await self._blobs.has_room():
            return "the disk is full"
        self._full = False
        return None

    def _folder_problem(self) -> str | None:
        """Returns what is wrong with the folders in ``state-dir``, or None. Blocking."""
        if self._catalogue is not None and _identity(self._catalogue[0]) != self._catalogue[1]:
            return "catalogue.sqlite was removed from state-dir, or replaced: restart obdelta"
        if self._lock is not None and (problem := self._lock.problem()) is not None:
            return problem
        for folder in self._folders:
            try:
                ownership.make_folder(folder)
                if not files.room_for_files(folder):
                    return "the disk is full: no inode is left"
                if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                    return (
                        f"{folder.name}/ in state-dir cannot be written: check its owner and mode"
                    )
            except OSError as error:
                return f"{folder.name}/ in state-dir cannot be used: {error.strerror}"
        return None

    async def settled(self) -> None:
        """Waits until no quota run is active. Call it before closing what the runs use."""
        while self._running is not None:
            waiter: Deferred[None] = Deferred()
            self._settling.append(waiter)
            await waiter


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
