"""The quota between fleets: shares, protection, and clocks that were ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.task import Clock, deferLater

from obdelta.concurrency.tasks import Threads
from obdelta.errors import QuotaUsedUp
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.fleet_bytes import FLEETS
from obdelta.store.catalogue.records import DeltaRow
from obdelta.store.quota import EXCESS_SECONDS, MAX_AHEAD, Quota, StoredDeltas
from obdelta.store.quota_service import QuotaService
from tests.support.caches import BLOCK, Time, add_layer, time
from tests.support.quota_store import SHARED, a_store, own_bytes
from tests.support.store import REACTOR, a_key, a_manifest, a_row, publish, some_layers, threads

__all__ = ["threads", "time"]


async def publish_in(
    catalogue: Catalogue, blobs: BlobStore, time: Time, number: int, *repositories: str
) -> DeltaRow:
    """Publishes the number-th delta for these repositories, and fetches it."""
    config, layers = some_layers(number)
    for content in (config, *layers):
        await blobs.put(content)
    manifest = a_manifest(config, layers)
    base, target = repositories
    row = replace(
        a_row(a_key(number), manifest.digest, int(time.now), own_bytes(number) + SHARED),
        base_repository=base,
        target_repository=target,
    )
    await catalogue.publish_v3(row, manifest, blobs)
    await catalogue.counters.served(row.content, int(time.now))
    return row


@pytest_twisted.ensureDeferred
async def test_a_fleet_above_its_share_loses_deltas_when_nothing_else_can_go(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        size = own_bytes(0) + SHARED
        cache = await LayerCache.open(tmp_path, threads, time)
        kind = StoredDeltas(catalogue, blobs, 10_000, time, share=2 * size + 100)
        pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("b", "e"), ("x", "y")]
        for number, pair in enumerate(pairs):
            await publish_in(catalogue, blobs, time, number, *pair)
            time.now += 1
        await add_layer(cache, time, 1, 1)
        quota = Quota({"deltas": kind, "layers": cache}, 1)
        time.now += FRESH_SECONDS + 1
        # All were fetched within the grace. The cache is evicted first, although it was used
        # later; then the large fleet's oldest.
        result = await quota.make_room(BLOCK + 1)
        assert result == BLOCK + own_bytes(0)
        await quota.reclaim()
        assert {row.key for row in await catalogue.recent(9)} == {a_key(2), a_key(3), a_key(4)}
        # New deltas stay, and so does one that the small fleet also has. Just fetched deltas are
        # evicted last.
        await catalogue.publish_for(a_key(3), "x", "z")
        for number, pair in enumerate([("e", "f"), ("f", "g"), ("g", "h")], start=5):
            await publish_in(catalogue, blobs, time, number, *pair)
        assert (await quota.reclaim()).freed == 0
        time.now += EXCESS_SECONDS + 1
        await catalogue.counters.served((await fetched(catalogue, 5)).content, int(time.now))
        await quota.reclaim()
        left = {row.key for row in await catalogue.recent(9)}
        assert left == {a_key(2), a_key(3), a_key(4), a_key(5)}


@pytest_twisted.ensureDeferred
async def test_many_fleets_that_fetch_for_ever_do_not_fill_the_store(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        count, size = 12, own_bytes(0) + SHARED
        ceiling = count * size
        deltas = StoredDeltas(catalogue, blobs, 10_000, time, share=ceiling // FLEETS)
        upkeep = QuotaService(
            Quota({"deltas": deltas}, ceiling),
            blobs,
            catalogue.counters.count,
            deltas=deltas,
            ceiling=ceiling,
        )
        for number in range(20):
            await upkeep.admit()
            await publish_in(catalogue, blobs, time, number, f"evil/{number}a", f"evil/{number}b")
            time.now += 1
            for row in await catalogue.recent(99):
                await catalogue.counters.served(row.content, int(time.now))
        assert len(await catalogue.recent(99)) < 20
        # The victim's delta stays, as long as its fleet has no more than an equal part.
        await upkeep.admit()
        await publish_in(catalogue, blobs, time, 90, "victim/1", "victim/2")
        for _ in range(5):
            time.now += 1
            assert await upkeep.problem() is None
            await upkeep.admit()
            for row in await catalogue.recent(99):
                await catalogue.counters.served(row.content, int(time.now))
        assert a_key(90) in {row.key for row in await catalogue.recent(99)}


async def fetched(catalogue: Catalogue, number: int) -> DeltaRow:
    row = await catalogue.delta(a_key(number))
    assert row is not None
    return row


@pytest_twisted.ensureDeferred
async def test_no_build_begins_where_protected_deltas_take_the_quota(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        quota = own_bytes(0) + SHARED
        kind = StoredDeltas(catalogue, blobs, 10_000, time)
        service = QuotaService(
            Quota({"deltas": kind}, quota),
            blobs,
            catalogue.counters.count,
            deltas=kind,
            ceiling=quota,
        )
        await service.admit()
        row = await publish(catalogue, blobs, 0, int(time.now))
        await catalogue.counters.served(row.content, int(time.now))
        with pytest.raises(QuotaUsedUp) as full:
            await service.admit()
        message = (
            f"the quota is used up: deltas served within keep-served take {quota:,} of"
            f" {quota:,} bytes"
        )
        assert message in str(full.value)
        assert message in (await service.problem() or "")
        time.now += 10_001
        # There is space to be freed, and the next build frees it.
        assert await service.problem() is None
        await service.admit()
        assert await service.problem() is None


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("ahead", [MAX_AHEAD + 1, 1800, 3600, 86400])
async def test_a_clock_that_was_ahead_does_not_block_the_quota(
    tmp_path: Path, threads: Threads, time: Time, ahead: int, fetched: bool
) -> None:
    """Runs before the hourly pass has corrected anything."""
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        quota = own_bytes(0) + SHARED
        kind = StoredDeltas(catalogue, blobs, 10_000, time)
        service = QuotaService(
            Quota({"deltas": kind}, quota),
            blobs,
            catalogue.counters.count,
            deltas=kind,
            ceiling=quota,
        )
        time.now += ahead
        row = await publish(catalogue, blobs, 0, int(time.now))
        if fetched:
            await catalogue.counters.served(row.content, int(time.now))
        with pytest.raises(QuotaUsedUp):
            await service.admit()
        # The clock is corrected: the age of the delta is unknown.
        time.now -= ahead
        await service.admit()
        assert await service.problem() is None
        # A small step back protects as before.
        row = await publish(catalogue, blobs, 1, int(time.now))
        await catalogue.counters.served(row.content, int(time.now))
        time.now -= MAX_AHEAD
        with pytest.raises(QuotaUsedUp):
            await service.admit()


@pytest_twisted.ensureDeferred
async def test_a_fleets_excess_may_go_after_the_clock_was_ahead(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        kind = StoredDeltas(catalogue, blobs, 10_000, time, share=1)
        time.now += 1800
        await publish_in(catalogue, blobs, time, 0, "a", "b")
        time.now -= 1800
        await publish_in(catalogue, blobs, time, 1, "x", "y")
        assert await Quota({"deltas": kind}, 1).make_room(1) == own_bytes(0)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(1)]


@pytest_twisted.ensureDeferred
async def test_a_build_waits_until_the_excess_of_others_may_go(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        ceiling, clock = own_bytes(0) + SHARED, Clock()
        deltas = StoredDeltas(catalogue, blobs, 10_000, time, share=ceiling // FLEETS)
        upkeep = QuotaService(
            Quota({"deltas": deltas}, ceiling),
            blobs,
            catalogue.counters.count,
            deltas=deltas,
            ceiling=ceiling,
            clock=clock,
        )
        await publish_in(catalogue, blobs, time, 0, "evil/1", "evil/2")
        admitted = ensureDeferred(upkeep.admit())
        while not clock.getDelayedCalls() and not admitted.called:
            await deferLater(REACTOR, 0.01)
        assert len(await catalogue.recent(9)) == 1
        admitted.cancel()
        with pytest.raises(CancelledError):
            await admitted
        assert not clock.getDelayedCalls()
        admitted = ensureDeferred(upkeep.admit())
        while not clock.getDelayedCalls() and not admitted.called:
            await deferLater(REACTOR, 0.01)
        time.now += EXCESS_SECONDS + 1
        clock.advance(EXCESS_SECONDS)
        await admitted
        assert await catalogue.recent(9) == []
