"""The quota over deltas and caches: what is evicted first."""

from __future__ import annotations

from pathlib import Path

import pytest_twisted
from twisted.internet.defer import ensureDeferred, gatherResults

from obdelta.concurrency.tasks import Threads
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.quota import UNFETCHED_SECONDS, Evictable, Quota, Reclaimed, StoredDeltas
from tests.support.caches import BLOCK, Time, add_layer, layer, present, time
from tests.support.quota_store import SHARED, a_store, own_bytes
from tests.support.store import a_key, publish, threads

__all__ = ["threads", "time"]


@pytest_twisted.ensureDeferred
async def test_the_oldest_of_all_kinds_goes_first_and_never_within_the_grace(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    start = int(time.now)
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        cache = await LayerCache.open(tmp_path, threads, time)
        for number in range(3):
            await publish(catalogue, blobs, number, int(time.now))
            await add_layer(cache, time, number, 1)
        kinds: dict[str, Evictable] = {
            "deltas": StoredDeltas(catalogue, blobs, 1000, time),
            "layers": cache,
        }
        deltas = sum(own_bytes(number) for number in range(3)) + SHARED
        usage = {"deltas": deltas, "layers": 3 * BLOCK}
        total = sum(usage.values())
        assert await Quota(kinds, total).reclaim() == Reclaimed(0, usage, 0)
        # All deltas are within the grace: only layers can be evicted, and that is not enough.
        held = await cache.pin(layer(1))
        assert held is not None
        result = await Quota(kinds, 1000).reclaim()
        assert result == Reclaimed(
            2 * BLOCK, {"deltas": deltas, "layers": BLOCK}, deltas + BLOCK - 1000
        )
        assert await present(cache, 3) == [1]
        held.release()
        time.now = start + 1000 + FRESH_SECONDS + 2
        await catalogue.counters.served((await catalogue.recent(9))[0].content, int(time.now))
        quota = Quota(kinds, deltas + BLOCK)
        # Older than the layer, which was pinned late: two deltas may be evicted, one was served
        # just now.
        assert (await quota.reclaim(1)).freed == own_bytes(0)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(2), a_key(1)]
        assert await quota.make_room(own_bytes(1) + 1) == own_bytes(1) + BLOCK
        assert [row.key for row in await catalogue.recent(9)] == [a_key(2)]
        assert await quota.make_room(1) == 0
        time.now += 1001
        assert await quota.make_room(1) == own_bytes(2) + SHARED
        assert await quota.usage() == {"deltas": 0, "layers": 0}
        assert not list(blobs.digests())


class Contested:
    """A kind whose oldest entry is always used just when it should be evicted."""

    def __init__(self) -> None:
        self.calls = 0

    async def usage(self) -> int:
        return 100

    async def oldest(self) -> float | None:
        return 0.0

    async def evict_oldest(self) -> int | None:
        self.calls += 1
        return None


@pytest_twisted.ensureDeferred
async def test_an_entry_that_cannot_be_removed_does_not_block_the_quota(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    await add_layer(cache, time, 0, 1)
    contested = Contested()
    quota = Quota({"contested": contested, "layers": cache}, 50)
    results = await gatherResults(
        [ensureDeferred(quota.reclaim()), ensureDeferred(quota.reclaim())]
    )
    assert [result.freed for result in results] == [BLOCK, 0]
    assert [result.over for result in results] == [50, 50]
    assert contested.calls == 2


@pytest_twisted.ensureDeferred
async def test_unfetched_deltas_go_first_and_the_grace_counts_from_the_fetch(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        grace = 100 * UNFETCHED_SECONDS
        kind = StoredDeltas(catalogue, blobs, grace, time)
        quota = Quota({"deltas": kind}, 1)
        rows = [
            await publish(catalogue, blobs, number, int(time.now) + number) for number in range(3)
        ]
        await catalogue.counters.served(rows[0].content, int(time.now))
        # Clients just got their names.
        assert (await quota.reclaim()).freed == 0
        time.now += UNFETCHED_SECONDS + 3
        assert (await quota.make_room(1)) == own_bytes(1)
        assert (await quota.reclaim()).freed == own_bytes(2)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(0)]
        time.now += grace
        assert (await quota.reclaim()).freed == own_bytes(0) + SHARED


@pytest_twisted.ensureDeferred
async def test_a_pinned_delta_stays_whatever_the_quota_or_the_fleets_share(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        size = own_bytes(0) + SHARED
        kind = StoredDeltas(catalogue, blobs, 1000, time, share=1)
        rows = [await publish(catalogue, blobs, number, int(time.now)) for number in range(3)]
        # Pinned deltas may take half of the quota.
        assert await catalogue.pin(rows[0].key, True, size)
        assert not await catalogue.pin(rows[1].key, True, 2 * size - 1)
        assert await catalogue.pin(rows[0].key, True, size)
        time.now += 10_000
        await Quota({"deltas": kind}, 1).reclaim()
        assert [row.key for row in await catalogue.recent(9)] == [a_key(0)]
        assert not await kind.drop_oldest() and not await kind.can_drop()
        assert not await kind.has_excess()
        # Built again with the same bytes, it stays pinned.
        await publish(catalogue, blobs, 0, int(time.now))
        await Quota({"deltas": kind}, 1).make_room(1)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(0)]
        await catalogue.pin(rows[0].key, False, size)
        time.now += 10_000
        await Quota({"deltas": kind}, 1).reclaim()
        assert await catalogue.recent(9) == []
