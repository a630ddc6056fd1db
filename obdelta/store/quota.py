"""The quota on ``state-dir``: evicts the least recently used content of any kind, never what is in
use.
"""

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


class Evictable(Protocol):
    """One kind of stored content (deltas, layers, trees). Sizes in bytes, times in seconds since
    the epoch.
    """

    async def usage(self) -> int:
        """Returns the bytes that it takes."""

    async def oldest(self) -> float | None:
        """Returns when its next candidate for eviction was last used; None if it has none."""

    async def evict_oldest(self) -> int | None:
        """Evicts that candidate. Returns the bytes freed (0 if they are shared), None if there was
        no candidate.
        """


UNFETCHED_SECONDS = 600
"""Seconds for which a new delta stays although it was never fetched: the client that got its name
will fetch it soon.
"""
EXCESS_SECONDS = 2
"""Seconds for which a delta of a fleet above its share stays after it was built. Open readers read
on to the end.
"""
MAX_AHEAD = 60
"""Seconds by which a stored time may be ahead of the clock and still protect its delta."""


class StoredDeltas:
    """Finished deltas. A delta fetched within ``keep_served`` seconds stays, for devices that pull
    it.

    Unfetched ones are evicted first. Deltas of ``recipe`` (of v3 now; None: of none) lose only
    their layers, which are rebuilt on request. If nothing else can be evicted, fleets with more
    than ``share`` bytes lose the excess.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: BlobStore,
        keep_served: int,
        clock: Callable[[], float],
        *,
        recipe: int | None = None,
        share: int | None = None,
    ) -> None:
        self._catalogue, self._blobs, self._keep_served, self._clock = (
            catalogue,
            blobs,
            keep_served,
            clock,
        )
        self._recipe = recipe if recipe is not None else -1
        self._share = share
        self._excess: tuple[int, ...] = ()

    async def usage(self) -> int:
        """Returns the bytes of all stored blobs; shared ones count once."""
        return (await self._catalogue.totals()).blob_bytes

    async def oldest(self) -> float | None:
        """Returns when the next delta to evict was last fetched or built; infinity if it is
        protected.
        """
        found, protection = await self._next()
        if found is None:
            return None
        return math.inf if protection.exempt else found.last_served

    async def evict_oldest(self) -> int | None:
        """Evicts its layers or all of it, and the blobs that no other delta needs."""
        found, protection = await self._next()
        if found is None:
            return None
        if (
            found.key.kind != "v3"
            or found.key.recipe != self._recipe
            or "effort" not in found.details
        ):
            return await self._catalogue.remove([found.key], self._blobs, unless=protection)
        freed = await self._evict_layers(found, protection)
        await self._catalogue.counters.add("delta.evicted")
        surplus = await self._catalogue.evictions.surplus(protection)
        return freed + (
            await self._catalogue.remove(surplus, self._blobs, unless=protection) if surplus else 0
        )

    async def _next(self) -> tuple[DeltaRow | None, Protection]:
        """Returns the next delta to evict, and what protects the others."""
        evictions = self._catalogue.evictions
        now, protection = int(self._clock()), self._protection()
        found = await evictions.oldest(protection)
        if found is not None or self._share is None:
            return found, protection
        found = await self._oldest_excess(protection)
        if found is None:
            # Reading every publication again is worthwhile only once the last selection is used up.
            before = now - min(self._keep_served, EXCESS_SECONDS)
            self._excess = tuple(await evictions.excess(self._share, before, protection.latest))
            found = await self._oldest_excess(protection)
        return found, replace(protection, exempt=self._excess)

    async def _oldest_excess(self, protection: Protection) -> DeltaRow | None:
        if not self._excess:
            return None
        exempt = replace(protection, exempt=self._excess)
        return await self._catalogue.evictions.oldest(exempt)

    def _protection(self) -> Protection:
        now = int(self._clock())
        return Protection(
            now - self._keep_served,
            now - min(self._keep_served, UNFETCHED_SECONDS),
            self._recipe,
            now + MAX_AHEAD,
        )

    async def can_drop(self) -> bool:
        """Returns whether :meth:`drop_oldest` has something to remove."""
        return await self._catalogue.evictions.oldest_whole(self._protection()) is not None

    async def has_excess(self) -> bool:
        """Returns whether a fleet exceeds its share, if only by deltas that were built just now."""
        latest = self._protection().latest
        return self._share is not None and bool(
            await self._catalogue.evictions.excess(self._share, latest, latest)
        )

    async def drop_oldest(self) -> bool:
        """Removes a whole unprotected delta with its row, manifest and config, which eviction
        leaves.

        Returns whether there was one.
        """
        protection = self._protection()
        found = await self._catalogue.evictions.oldest_whole(protection)
        if found is not None:
            await self._catalogue.remove([found.key], self._blobs, unless=protection)
        return found is not None

    async def _evict_layers(self, row: DeltaRow, protection: Protection) -> int:
        try:
            return await self._catalogue.evictions.evict_layers(row, self._blobs, protection)
        except StoreFull:
            await self._blobs.drop_reserve()
        try:
            return await self._catalogue.evictions.evict_layers(row, self._blobs, protection)
        finally:
            await self._blobs.set_reserve_aside()


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The result of a run. ``freed`` bytes; ``usage`` of each kind now; ``over``: bytes above the
    quota that could not be freed.
    """

    freed: int
    usage: Mapping[str, int]
    over: int


class Quota:
    """Keeps ``kinds`` together under ``quota`` bytes."""

    def __init__(self, kinds: Mapping[str, Evictable], quota: int) -> None:
        self._kinds, self._quota = dict(kinds), quota
        self._one_at_a_time = DeferredLock()

    async def usage(self) -> dict[str, int]:
        """Returns the bytes of each kind."""
        return {name: await kind.usage() for name, kind in self._kinds.items()}

    async def reclaim(self, wanted: int = 0) -> Reclaimed:
        """Evicts until ``wanted`` more bytes fit under the quota, or nothing more can be
        evicted.
        """
        await self._one_at_a_time.acquire()
        try:
            excess = sum((await self.usage()).values()) + wanted - self._quota
            freed = await _free(list(self._kinds.values()), excess)
            usage = await self.usage()
        finally:
            self._one_at_a_time.release()
        return Reclaimed(freed, usage, max(0, sum(usage.values()) + wanted - self._quota))

    async def make_room(self, wanted: int) -> int:
        """Frees ``wanted`` bytes regardless of the quota, since the disk is full. Returns the bytes
        freed.
        """
        await self._one_at_a_time.acquire()
        try:
            return await _free(list(self._kinds.values()), wanted)
        finally:
            self._one_at_a_time.release()


async def _free(kinds: list[Evictable], wanted: int) -> int:
    freed = 0
    while freed < wanted:
        ages = [(await kind.oldest(), index) for index, kind in enumerate(kinds)]
        candidates = [(age, index) for age, index in ages if age is not None]
        if not candidates:
            break
        _, index = min(candidates)
        try:
            size = await kinds[index].evict_oldest()
        except StoreFull:
            # Even an eviction has to write something; another kind may be able to free space for
            # it.
            size = None
        if size is None:
            # It was used in the meantime, or cannot be evicted.
            kinds = kinds[:index] + kinds[index + 1 :]
        else:
            freed += size
    return freed
