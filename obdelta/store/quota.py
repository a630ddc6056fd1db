"""The quota: what was not used for longest goes first, whatever kind it is; what is in use stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from twisted.internet.defer import DeferredLock

from obdelta.errors import StoreFull
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.evictions import Protection
from obdelta.store.catalogue.records import DeltaRow


class Shelf(Protocol):
    """One kind of what is kept (deltas, layers, trees). Sizes in bytes, times in seconds since the
    epoch.
    """

    async def usage(self) -> int:
        """Bytes that it takes."""

    async def oldest(self) -> float | None:
        """When that which it would give up next was last used; None when it can give up nothing."""

    async def evict_oldest(self) -> int | None:
        """Gives that up; how many bytes became free (perhaps 0: shared), None when there was
        nothing to give up.
        """


UNFETCHED_SECONDS = 600
"""A new delta stays so long although no client has fetched it: the one that was told its name is
about to.
"""
EXCESS_SECONDS = 5
"""A delta of a fleet above its share stays so long after it was made or fetched. What is being read
is read to its end.
"""


class DeltaShelf:
    """Finished deltas. One that was fetched within ``grace`` seconds stays: a device may be pulling
    it.

    Unfetched ones go first. Those of ``recipe`` (of v3 now; None: of none) give up their layers
    only, and are rebuilt on request. Where nothing else can go, fleets that have more than
    ``share`` bytes give up what they have above it.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: BlobStore,
        grace: int,
        clock: Callable[[], float],
        *,
        recipe: int | None = None,
        share: int | None = None,
    ) -> None:
        self._catalogue, self._blobs, self._grace, self._clock = catalogue, blobs, grace, clock
        self._recipe = recipe if recipe is not None else -1
        self._share = share
        self._excess: tuple[int, ...] = ()

    async def usage(self) -> int:
        """Bytes of all blobs that are here, shared ones once."""
        return (await self._catalogue.totals()).blob_bytes

    async def oldest(self) -> float | None:
        """When the delta that would go next was last fetched, or made; later than everything where
        it is protected.
        """
        found, protection = await self._next()
        if found is None:
            return None
        return math.inf if protection.exempt else found.last_served

    async def evict_oldest(self) -> int | None:
        """Its layers, or all of it, and the blobs that no other needs."""
        found, protection = await self._next()
        if found is None:
            return None
        if (
            found.key.kind != "v3"
            or found.key.recipe != self._recipe
            or "effort" not in found.details
        ):
            return await self._catalogue.remove([found.key], self._blobs, unless=protection)
        freed = await self._give_up(found, protection)
        await self._catalogue.add("delta.evicted")
        surplus = await self._catalogue.evictions.surplus(protection)
        return freed + (
            await self._catalogue.remove(surplus, self._blobs, unless=protection) if surplus else 0
        )

    async def _next(self) -> tuple[DeltaRow | None, Protection]:
        """The delta that should go next, and what protects the others."""
        evictions = self._catalogue.evictions
        now, protection = int(self._clock()), self._protection()
        found = await evictions.oldest(protection)
        if found is not None or self._share is None:
            return found, protection
        found = (
            await evictions.oldest(replace(protection, exempt=self._excess))
            if self._excess
            else None
        )
        if found is None:
            # To look at every publication again is worth it only once the last choice is used up.
            self._excess = tuple(
                await evictions.excess(self._share, now - min(self._grace, EXCESS_SECONDS))
            )
            found = (
                await evictions.oldest(replace(protection, exempt=self._excess))
                if self._excess
                else None
            )
        return found, replace(protection, exempt=self._excess)

    def _protection(self) -> Protection:
        now = int(self._clock())
        return Protection(
            now - self._grace, now - min(self._grace, UNFETCHED_SECONDS), self._recipe
        )

    async def can_drop(self) -> bool:
        """Whether :meth:`drop_oldest` has something to remove."""
        return await self._catalogue.evictions.oldest_whole(self._protection()) is not None

    async def drop_oldest(self) -> bool:
        """Removes a whole delta that is not protected: row, manifest and config too, which evicting
        leaves.

        Returns whether there was one.
        """
        protection = self._protection()
        found = await self._catalogue.evictions.oldest_whole(protection)
        if found is not None:
            await self._catalogue.remove([found.key], self._blobs, unless=protection)
        return found is not None

    async def _give_up(self, row: DeltaRow, protection: Protection) -> int:
        try:
            return await self._catalogue.evictions.give_up(row, self._blobs, protection)
        except StoreFull:
            await self._blobs.drop_reserve()
        try:
            return await self._catalogue.evictions.give_up(row, self._blobs, protection)
        finally:
            await self._blobs.set_reserve_aside()


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """``freed`` bytes; ``usage`` of each shelf now; ``over``: bytes above the quota that nothing
    could be done about.
    """

    freed: int
    usage: Mapping[str, int]
    over: int


class Retention:
    """Keeps ``shelves`` together under ``quota`` bytes, and each under its own of ``limits``, where
    it has one.
    """

    def __init__(
        self, shelves: Mapping[str, Shelf], quota: int, limits: Mapping[str, int] | None = None
    ) -> None:
        self._shelves = dict(shelves)
        self._quota, self._limits = quota, dict(limits or {})
        unknown = self._limits.keys() - self._shelves.keys()
        if unknown:
            raise ValueError(f"limits for unknown shelves: {sorted(unknown)}")
        self._one_at_a_time = DeferredLock()

    async def usage(self) -> dict[str, int]:
        """Bytes of each shelf."""
        return {name: await shelf.usage() for name, shelf in self._shelves.items()}

    async def reclaim(self, wanted: int = 0) -> Reclaimed:
        """Removes until ``wanted`` more bytes fit under the quota, or nothing more can go."""
        await self._one_at_a_time.acquire()
        try:
            freed = 0
            for name, limit in self._limits.items():
                shelf = self._shelves[name]
                freed += await _free([shelf], await shelf.usage() - limit)
            excess = sum((await self.usage()).values()) + wanted - self._quota
            freed += await _free(list(self._shelves.values()), excess)
            usage = await self.usage()
        finally:
            self._one_at_a_time.release()
        return Reclaimed(freed, usage, max(0, sum(usage.values()) + wanted - self._quota))

    async def make_room(self, wanted: int) -> int:
        """Frees ``wanted`` bytes whatever the quota says (the disk is full); gives back how many it
        could.
        """
        await self._one_at_a_time.acquire()
        try:
            return await _free(list(self._shelves.values()), wanted)
        finally:
            self._one_at_a_time.release()


async def _free(shelves: list[Shelf], wanted: int) -> int:
    freed = 0
    while freed < wanted:
        ages = [(await shelf.oldest(), index) for index, shelf in enumerate(shelves)]
        candidates = [(age, index) for age, index in ages if age is not None]
        if not candidates:
            break
        _, index = min(candidates)
        try:
            size = await shelves[index].evict_oldest()
        except StoreFull:
            # Even giving up has to write something; perhaps another kind can make the room for it.
            size = None
        if size is None:
            # It was used in the meantime, or cannot.
            shelves = shelves[:index] + shelves[index + 1 :]
        else:
            freed += size
    return freed
