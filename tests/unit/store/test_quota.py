"""Caches and the quota: what is used stays, what was not used for longest goes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import ensureDeferred, gatherResults

from obdelta.concurrency.threads import Threads
from obdelta.errors import QuotaUsedUp, SizeMismatch, StoreFull
from obdelta.oci import ChainID, DiffID
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS, Cache
from obdelta.store.caches.layer_cache import LayerCache
from obdelta.store.caches.tree_cache import TreeCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow
from obdelta.store.quota import (
    EXCESS_SECONDS,
    UNFETCHED_SECONDS,
    DeltaShelf,
    Reclaimed,
    Retention,
    Shelf,
)
from obdelta.store.quota_service import Upkeep
from tests.support.logs import logged
from tests.support.store import (
    REACTOR,
    a_key,
    a_manifest,
    a_row,
    publish,
    real_threads,
    some_layers,
)

BLOCK = 4096


class Time:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def threads() -> Iterator[Threads]:
    with real_threads() as pool:
        yield pool


def layer(number: int) -> DiffID:
    return DiffID.of(b"layer %d" % number)


async def add_layer(cache: LayerCache, time: Time, number: int, blocks: int) -> None:
    """Adopts a layer; afterwards a minute and a second have gone by."""
    tmp = cache.root.parent / "tmp" / f"layer{number}"
    tmp.write_bytes(b"x" * (blocks * BLOCK))
    await cache.adopt(tmp, layer(number), blocks * BLOCK)
    assert not tmp.exists()
    time.now += FRESH_SECONDS + 1


async def present(cache: LayerCache, count: int) -> list[int]:
    """Which of the first layers are there, by name and by the cache's own word."""
    present_files = {path.name for path in cache.root.iterdir()}
    found = [number for number in range(count) if f"{layer(number).hex}.tar" in present_files]
    assert present_files == {f"{layer(number).hex}.tar" for number in found} | {
        name for name in present_files if name.endswith(".idx")
    }
    for name in present_files:
        assert name.partition(".")[0] in {layer(number).hex for number in found}
    assert await cache.usage() == sum(files.disk_bytes(path) for path in cache.root.iterdir())
    return found


async def add_whole_layer(cache: LayerCache, content: bytes) -> tuple[DiffID, Path]:
    """One whose name is its digest."""
    diff_id = DiffID.of(content)
    tmp = cache.root.parent / "tmp" / "whole"
    tmp.write_bytes(content)
    await cache.adopt(tmp, diff_id, len(content))
    return diff_id, cache.root / f"{diff_id.hex}.tar"


# -- layers ------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("marked", [True, False], ids=["by another boot", "not marked"])
@pytest.mark.parametrize(
    "torn", [b"", b"\0" * 10_000, b"content" * 100], ids=["empty", "zeroes", "shorter"]
)
async def test_a_layer_that_a_power_cut_tore_is_not_handed_out(
    torn: bytes, marked: bool, tmp_path: Path, threads: Threads, time: Time
) -> None:
    """Layers are not synced: after the system was down they are hashed before they are used."""
    cache = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    diff_id, path = await add_whole_layer(cache, b"content" * 1000)
    (path.parent / f"{diff_id.hex}.idx").write_bytes(b"")
    path.write_bytes(torn)
    if marked:
        os.setxattr(path, "user.obdelta.boot", b"of another boot")
    else:
        os.removexattr(path, "user.obdelta.boot")
    again = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    assert await again.pin(diff_id) is None
    assert list(again.root.iterdir()) == []
    assert await again.usage() == 0
    assert await again.pin(diff_id) is None
    await add_whole_layer(again, b"content" * 1000)
    assert await again.pin(diff_id) is not None


@pytest_twisted.ensureDeferred
async def test_a_layer_that_survived_a_power_cut_is_hashed_once(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    diff_id, path = await add_whole_layer(cache, b"content" * 1000)
    mark = os.getxattr(path, "user.obdelta.boot")
    os.setxattr(path, "user.obdelta.boot", b"of another boot")
    again = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    pinned = await again.pin(diff_id)
    assert pinned is not None
    assert os.getxattr(path, "user.obdelta.boot") == mark


@pytest_twisted.ensureDeferred
async def test_a_layer_comes_back_pinned(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    assert await cache.pin(layer(0)) is None
    await add_layer(cache, time, 0, 2)
    pinned = await cache.pin(layer(0))
    assert pinned is not None
    with pinned:
        assert (pinned.diff_id, pinned.size) == (layer(0), 2 * BLOCK)
        assert pinned.path == tmp_path / "layers" / f"{layer(0).hex}.tar"
        assert pinned.path.read_bytes() == b"x" * 2 * BLOCK
    pinned.release()
    with pytest.raises(SizeMismatch):
        tmp = tmp_path / "tmp" / "short"
        tmp.write_bytes(b"x")
        await cache.adopt(tmp, layer(1), 2)
    assert not list((tmp_path / "tmp").iterdir())
    assert await cache.pin(layer(1)) is None


@pytest_twisted.ensureDeferred
async def test_the_least_recently_used_goes_and_the_pinned_stays(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, 10 * BLOCK, time)
    for number in range(5):
        await add_layer(cache, time, number, 2)
    assert await present(cache, 6) == [0, 1, 2, 3, 4]
    used = await cache.pin(layer(0))
    assert used is not None
    used.release()
    time.now += 1
    held = await cache.pin(layer(1))
    again = await cache.pin(layer(1))
    assert held is not None
    assert again is not None
    await add_layer(cache, time, 5, 2)
    assert await present(cache, 6) == [0, 1, 3, 4, 5]
    # A new one may exceed the limit on its own; it stays while it is fresh or pinned.
    await add_layer(cache, time, 6, 20)
    assert await present(cache, 7) == [1, 6]
    large = await cache.pin(layer(6))
    assert large is not None
    held.release()
    held.release()
    assert await present(cache, 7) == [1, 6]
    large.release()
    assert await present(cache, 7) == [1]
    assert await cache.evict_oldest() is None
    again.release()
    assert await cache.evict_oldest() == 2 * BLOCK
    assert await present(cache, 7) == []


@pytest_twisted.ensureDeferred
async def test_a_fresh_layer_stays_until_it_was_used(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, BLOCK, time)
    for number in range(2):
        await add_layer(cache, time, number, 2)
        time.now -= FRESH_SECONDS
    assert await present(cache, 2) == [0, 1]
    assert await cache.oldest() is None
    pinned = await cache.pin(layer(0))
    assert pinned is not None
    pinned.release()
    await cache.make_room(0)
    assert await cache.pin(layer(0)) is None
    assert await cache.pin(layer(1)) is not None


@pytest_twisted.ensureDeferred
async def test_indexes_are_counted_and_go_with_their_layer(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, 10 * BLOCK, time)
    for number in range(3):
        await add_layer(cache, time, number, 2)
    pinned = await cache.pin(layer(2))
    assert pinned is not None
    (cache.root / f"{layer(2).hex}.idx").write_bytes(b"i" * (3 * BLOCK + 1))
    assert await cache.usage() == 6 * BLOCK
    pinned.release()
    assert await cache.usage() == 10 * BLOCK
    time.now += 1
    pinned = await cache.pin(layer(1))
    assert pinned is not None
    (cache.root / f"{layer(1).hex}.idx").write_bytes(b"i")
    pinned.release()
    assert await present(cache, 3) == [1, 2]
    time.now += 1
    assert await cache.evict_oldest() == 6 * BLOCK
    assert await present(cache, 3) == [1]
    assert await cache.make_room(1) == 3 * BLOCK
    assert await cache.make_room(1) == 0
    assert not list(cache.root.iterdir())
    assert await cache.usage() == 0


@pytest_twisted.ensureDeferred
async def test_a_restart_finds_what_is_there(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    for number in range(4):
        await add_layer(cache, time, number, 2)
    oldest = await cache.pin(layer(0))
    assert oldest is not None
    (cache.root / f"{layer(0).hex}.idx").write_bytes(b"i" * BLOCK)
    (cache.root / f"{layer(9).hex}.idx").write_bytes(b"orphan")
    (cache.root / f"{layer(9).hex}.idxk2_x9.tmp").write_bytes(b"a worker was killed here")
    foreign = [cache.root / f"{layer(9).hex}.tar.part", cache.root / "junk" / "file"]
    (cache.root / "junk").mkdir()
    for path in foreign:
        path.write_bytes(b"a stranger")
    with logged("info", "warn") as lines:
        again = await LayerCache.open(tmp_path, threads, 5 * BLOCK, time)
    # What has no name of ours stays.
    assert [path.read_bytes() for path in foreign] == [b"a stranger"] * 2
    assert lines[0].startswith(
        "start: 2 entries that an earlier run left in layers/ were removed: "
    )
    assert lines[1].startswith("start: layers/ holds 2 entries that obdelta did not make: ")
    foreign[0].unlink()
    shutil.rmtree(foreign[1].parent)
    assert await present(again, 10) == [0, 3]
    # Somebody removes a file: it is not there, and no error.
    (again.root / f"{layer(3).hex}.tar").unlink()
    assert await again.pin(layer(3)) is None
    assert await again.usage() == 3 * BLOCK
    await again.remove(layer(3))
    await again.remove(layer(0))
    assert await again.pin(layer(0)) is None
    assert not list(again.root.iterdir())


@pytest_twisted.ensureDeferred
async def test_the_same_layer_is_adopted_many_times_at_once(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, 100 * BLOCK, time)
    adoptions = []
    for index in range(10):
        tmp = tmp_path / "tmp" / str(index)
        tmp.write_bytes(b"x" * BLOCK)
        adoptions.append(ensureDeferred(cache.adopt(tmp, layer(0), BLOCK)))
    await gatherResults(adoptions)
    assert await present(cache, 1) == [0]
    assert not list((tmp_path / "tmp").iterdir())
    pinned = await cache.pin(layer(0))
    assert pinned is not None
    await cache.remove(layer(0))
    await add_layer(cache, time, 0, 2)
    pinned.release()
    assert await present(cache, 1) == [0]


class FullOnce(Cache):
    """A disk that is found full when the file is synced, as with delayed allocation."""

    async def adopt(self, tmp: Path, name: str, times: int) -> None:
        failures = [None] * times

        def prepare(path: Path) -> None:
            if failures:
                failures.pop()
                with files.full_is_clear():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        await self._adopt(tmp, name, prepare)


@pytest_twisted.ensureDeferred
async def test_a_full_disk_costs_others_their_place_first(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = FullOnce(tmp_path / "cache", tmp_path / "tmp", threads, 100 * BLOCK, time)
    await cache.scan()

    async def adopt(number: int, times: int) -> None:
        tmp = tmp_path / "tmp" / "new"
        tmp.write_bytes(b"x" * BLOCK)
        await cache.adopt(tmp, layer(number).hex, times)

    await adopt(0, 0)
    with pytest.raises(StoreFull, match="no space is left"):
        await adopt(1, 1)  # the other one is still fresh
    time.now += FRESH_SECONDS + 1
    await adopt(2, 1)
    assert [path.name for path in cache.root.iterdir()] == [layer(2).hex]
    time.now += FRESH_SECONDS + 1
    with pytest.raises(StoreFull):
        await adopt(3, 2)
    assert not list(cache.root.iterdir())
    assert not list((tmp_path / "tmp").iterdir())


# -- trees -------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_tree_keeps_its_own_times(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await TreeCache.open(tmp_path, threads, 10_000_000, time)
    chain = ChainID.of(b"image")
    for _ in range(2):
        tmp = tmp_path / "tmp" / "tree"
        (tmp / "root" / "etc").mkdir(parents=True)
        (tmp / "root" / "etc" / "passwd").write_text("root")
        os.utime(tmp / "root", (5, 5))
        await cache.adopt(tmp, chain)
        assert not tmp.exists()
    pinned = await cache.pin(chain)
    assert pinned is not None
    with pinned:
        assert pinned.path == tmp_path / "trees" / chain.hex / "root"
        assert (pinned.path / "etc" / "passwd").read_text() == "root"
        assert pinned.path.stat().st_mtime == 5
        assert await cache.evict_oldest() is None
    again = await TreeCache.open(tmp_path, threads, 10_000_000, time)
    assert await again.oldest() == time.now
    assert await again.usage() == await cache.usage() > 0
    assert await again.pin(ChainID.of(b"other")) is None
    assert await again.evict_oldest() == await cache.usage()
    assert not list((tmp_path / "trees").iterdir())
    assert not list((tmp_path / "tmp").iterdir())


# -- the quota ---------------------------------------------------------------------------------


@asynccontextmanager
async def a_store(tmp_path: Path, threads: Threads) -> AsyncIterator[tuple[BlobStore, Catalogue]]:
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    try:
        yield blobs, catalogue
    finally:
        await catalogue.close()


def own_bytes(number: int) -> int:
    config, layers = some_layers(number)
    return len(config) + sum(map(len, layers[:-1]))


SHARED = len(some_layers(0)[1][-1])


@pytest_twisted.ensureDeferred
async def test_oldest_first_over_all_kinds_and_never_within_the_grace(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    start = int(time.now)
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        cache = await LayerCache.open(tmp_path, threads, 10**9, time)
        for number in range(3):
            await publish(catalogue, blobs, number, int(time.now))
            await add_layer(cache, time, number, 1)
        shelves: dict[str, Shelf] = {
            "deltas": DeltaShelf(catalogue, blobs, 1000, time),
            "layers": cache,
        }
        deltas = sum(own_bytes(number) for number in range(3)) + SHARED
        usage = {"deltas": deltas, "layers": 3 * BLOCK}
        total = sum(usage.values())
        assert await Retention(shelves, total).reclaim() == Reclaimed(0, usage, 0)
        # All deltas are within the grace: only layers can go, and that is not enough.
        held = await cache.pin(layer(1))
        assert held is not None
        result = await Retention(shelves, 1000).reclaim()
        assert result == Reclaimed(
            2 * BLOCK, {"deltas": deltas, "layers": BLOCK}, deltas + BLOCK - 1000
        )
        assert await present(cache, 3) == [1]
        held.release()
        time.now = start + 1000 + FRESH_SECONDS + 2
        await catalogue.served((await catalogue.recent(9))[0].content, int(time.now))
        retention = Retention(shelves, deltas + BLOCK)
        # Older than the layer, which was pinned late: two deltas may go, one was served just now.
        assert (await retention.reclaim(1)).freed == own_bytes(0)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(2), a_key(1)]
        assert await retention.make_room(own_bytes(1) + 1) == own_bytes(1) + BLOCK
        assert [row.key for row in await catalogue.recent(9)] == [a_key(2)]
        assert await retention.make_room(1) == 0
        time.now += 1001
        assert await retention.make_room(1) == own_bytes(2) + SHARED
        assert await retention.usage() == {"deltas": 0, "layers": 0}
        assert not list(blobs.digests())


@pytest_twisted.ensureDeferred
async def test_a_kind_may_have_a_limit_of_its_own(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        cache = await LayerCache.open(tmp_path, threads, 10**9, time)
        await publish(catalogue, blobs, 0, int(time.now))
        for number in range(3):
            await add_layer(cache, time, number, 1)
        shelves: dict[str, Shelf] = {
            "deltas": DeltaShelf(catalogue, blobs, 0, time),
            "layers": cache,
        }
        result = await Retention(shelves, 10**9, {"layers": BLOCK}).reclaim()
        assert result == Reclaimed(2 * BLOCK, {"deltas": own_bytes(0) + SHARED, "layers": BLOCK}, 0)
        assert await present(cache, 3) == [2]
        with pytest.raises(ValueError, match="trees"):
            Retention(shelves, 1, {"trees": 1})


class Contested:
    """A shelf whose oldest is always used just when it should go."""

    def __init__(self) -> None:
        self.asked = 0

    async def usage(self) -> int:
        return 100

    async def oldest(self) -> float | None:
        return 0.0

    async def evict_oldest(self) -> int | None:
        self.asked += 1
        return None


@pytest_twisted.ensureDeferred
async def test_what_cannot_go_after_all_does_not_hold_it_up(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, 10**9, time)
    await add_layer(cache, time, 0, 1)
    contested = Contested()
    retention = Retention({"contested": contested, "layers": cache}, 50)
    results = await gatherResults(
        [ensureDeferred(retention.reclaim()), ensureDeferred(retention.reclaim())]
    )
    assert [result.freed for result in results] == [BLOCK, 0]
    assert [result.over for result in results] == [50, 50]
    assert contested.asked == 2


@pytest_twisted.ensureDeferred
async def test_unfetched_deltas_go_first_and_the_grace_counts_from_the_fetch(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        grace = 100 * UNFETCHED_SECONDS
        shelf = DeltaShelf(catalogue, blobs, grace, time)
        retention = Retention({"deltas": shelf}, 1)
        rows = [
            await publish(catalogue, blobs, number, int(time.now) + number) for number in range(3)
        ]
        await catalogue.served(rows[0].content, int(time.now))
        # Clients were just told their names.
        assert (await retention.reclaim()).freed == 0
        time.now += UNFETCHED_SECONDS + 3
        assert (await retention.make_room(1)) == own_bytes(1)
        assert (await retention.reclaim()).freed == own_bytes(2)
        assert [row.key for row in await catalogue.recent(9)] == [a_key(0)]
        time.now += grace
        assert (await retention.reclaim()).freed == own_bytes(0) + SHARED


async def publish_in(
    catalogue: Catalogue, blobs: BlobStore, time: Time, number: int, *repositories: str
) -> DeltaRow:
    """The number-th delta, of these repositories, fetched."""
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
    await catalogue.served(row.content, int(time.now))
    return row


@pytest_twisted.ensureDeferred
async def test_a_fleet_above_its_share_gives_up_some_when_nothing_else_can_go(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    async with a_store(tmp_path, threads) as (blobs, catalogue):
        size = own_bytes(0) + SHARED
        cache = await LayerCache.open(tmp_path, threads, 10**9, time)
        shelf = DeltaShelf(catalogue, blobs, 10_000, time, share=2 * size + 100)
        pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("b", "e"), ("x", "y")]
        for number, pair in enumerate(pairs):
            await publish_in(catalogue, blobs, time, number, *pair)
            time.now += 1
        await add_layer(cache, time, 1, 1)
        retention = Retention({"deltas": shelf, "layers": cache}, 1)
        time.now += FRESH_SECONDS + 1
        # All were fetched within the grace. The cache goes first, although it was used later; then
        # the large fleet's oldest.
        result = await retention.make_room(BLOCK + 1)
        assert result == BLOCK + own_bytes(0)
        await retention.reclaim()
        assert {row.key for row in await catalogue.recent(9)} == {a_key(2), a_key(3), a_key(4)}
        # What a device has just fetched stays; and a delta that the small fleet has, too.
        await catalogue.publish_for(a_key(3), "x", "z")
        for number, pair in enumerate([("e", "f"), ("f", "g"), ("g", "h")], start=5):
            await publish_in(catalogue, blobs, time, number, *pair)
        await catalogue.served((await fetched(catalogue, 2)).content, int(time.now))
        assert (await retention.reclaim()).freed == 0
        time.now += EXCESS_SECONDS + 1
        await retention.reclaim()
        left = {row.key for row in await catalogue.recent(9)}
        assert {a_key(3), a_key(4)} < left
        assert len(left) == 4


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
        shelf = DeltaShelf(catalogue, blobs, 10_000, time)
        upkeep = Upkeep(
            Retention({"deltas": shelf}, quota), blobs, catalogue.count, deltas=shelf, ceiling=quota
        )
        await upkeep.admit()
        row = await publish(catalogue, blobs, 0, int(time.now))
        await catalogue.served(row.content, int(time.now))
        with pytest.raises(QuotaUsedUp) as full:
            await upkeep.admit()
        told = (
            f"the quota is used up: deltas that were fetched within the grace take {quota:,} of"
            f" {quota:,} bytes"
        )
        assert told in str(full.value)
        assert told in (await upkeep.problem() or "")
        time.now += 10_001
        # There is room to be made, and the next build makes it.
        assert await upkeep.problem() is None
        await upkeep.admit()
        assert await upkeep.problem() is None
