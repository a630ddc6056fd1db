"""The caches of layers and trees: pins, ages, restarts, and power cuts."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import ensureDeferred, gatherResults

from obdelta.concurrency.tasks import Threads
from obdelta.errors import SizeMismatch, StoreFull
from obdelta.oci import ChainID, DiffID
from obdelta.store import files
from obdelta.store.caches.cache import FRESH_SECONDS, Cache
from obdelta.store.caches.digest_caches import LayerCache, TreeCache
from obdelta.store.quota import (
    Quota,
)
from tests.support.caches import BLOCK, Time, add_layer, layer, present, time
from tests.support.logs import logged
from tests.support.store import threads

__all__ = ["threads", "time"]


async def add_complete_layer(cache: LayerCache, content: bytes) -> tuple[DiffID, Path]:
    """Adds a layer whose name is its digest."""
    diff_id = DiffID.of(content)
    tmp = cache.root.parent / "tmp" / "whole"
    tmp.write_bytes(content)
    await cache.adopt(tmp, diff_id, len(content))
    return diff_id, cache.root / f"{diff_id.hex}.tar"


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("marked", [True, False], ids=["by another boot", "not marked"])
@pytest.mark.parametrize(
    "torn", [b"", b"\0" * 10_000, b"content" * 100], ids=["empty", "zeroes", "shorter"]
)
async def test_a_layer_torn_by_a_power_cut_is_not_used(
    torn: bytes, marked: bool, tmp_path: Path, threads: Threads, time: Time
) -> None:
    """Layers are not synced: after an OS crash they are hashed before use."""
    cache = await LayerCache.open(tmp_path, threads, time)
    diff_id, path = await add_complete_layer(cache, b"content" * 1000)
    (path.parent / f"{diff_id.hex}.idx").write_bytes(b"")
    path.write_bytes(torn)
    if marked:
        os.setxattr(path, "user.obdelta.boot", b"of another boot")
    else:
        os.removexattr(path, "user.obdelta.boot")
    again = await LayerCache.open(tmp_path, threads, time)
    assert await again.pin(diff_id) is None
    assert list(again.root.iterdir()) == []
    assert await again.usage() == 0
    assert await again.pin(diff_id) is None
    await add_complete_layer(again, b"content" * 1000)
    assert await again.pin(diff_id) is not None


@pytest_twisted.ensureDeferred
async def test_a_layer_that_survived_a_power_cut_is_hashed_once(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    diff_id, path = await add_complete_layer(cache, b"content" * 1000)
    mark = os.getxattr(path, "user.obdelta.boot")
    os.setxattr(path, "user.obdelta.boot", b"of another boot")
    again = await LayerCache.open(tmp_path, threads, time)
    pinned = await again.pin(diff_id)
    assert pinned is not None
    assert os.getxattr(path, "user.obdelta.boot") == mark


@pytest_twisted.ensureDeferred
async def test_a_returned_layer_is_pinned(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
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
async def test_the_oldest_used_entry_is_removed_and_a_pinned_one_stays(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    quota = Quota({"layers": cache}, 10 * BLOCK)
    for number in range(5):
        await add_layer(cache, time, number, 2)
        await quota.reclaim()
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
    await quota.reclaim()
    assert await present(cache, 6) == [0, 1, 3, 4, 5]
    # A new entry alone may exceed the quota; it stays while it is fresh or pinned.
    await add_layer(cache, time, 6, 20)
    time.now -= FRESH_SECONDS + 1
    await quota.reclaim()
    time.now += FRESH_SECONDS + 1
    assert await present(cache, 7) == [1, 6]
    large = await cache.pin(layer(6))
    assert large is not None
    held.release()
    held.release()
    await quota.reclaim()
    assert await present(cache, 7) == [1, 6]
    large.release()
    await quota.reclaim()
    assert await present(cache, 7) == [1]
    assert await cache.evict_oldest() is None
    again.release()
    assert await cache.evict_oldest() == 2 * BLOCK
    assert await present(cache, 7) == []


@pytest_twisted.ensureDeferred
async def test_a_fresh_layer_stays_until_it_was_used(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    for number in range(2):
        await add_layer(cache, time, number, 2)
        time.now -= FRESH_SECONDS
    assert await present(cache, 2) == [0, 1]
    assert await cache.oldest() is None
    pinned = await cache.pin(layer(0))
    assert pinned is not None
    pinned.release()
    await Quota({"layers": cache}, BLOCK).reclaim()
    assert await cache.pin(layer(0)) is None
    assert await cache.pin(layer(1)) is not None


@pytest_twisted.ensureDeferred
async def test_indexes_are_counted_and_removed_with_their_layer(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    quota = Quota({"layers": cache}, 10 * BLOCK)
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
    await quota.reclaim()
    assert await present(cache, 3) == [1, 2]
    time.now += 1
    assert await cache.evict_oldest() == 6 * BLOCK
    assert await present(cache, 3) == [1]
    assert await quota.make_room(1) == 3 * BLOCK
    assert await quota.make_room(1) == 0
    assert not list(cache.root.iterdir())
    assert await cache.usage() == 0


@pytest_twisted.ensureDeferred
async def test_a_restart_finds_cached_layers(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
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
        again = await LayerCache.open(tmp_path, threads, time)
    await Quota({"layers": again}, 5 * BLOCK).reclaim()
    # A file without a name of ours stays.
    assert [path.read_bytes() for path in foreign] == [b"a stranger"] * 2
    assert lines[0].startswith(
        "start: 2 entries that an earlier run left in layers/ were removed: "
    )
    assert lines[1].startswith("start: layers/ holds 2 entries that obdelta did not make: ")
    foreign[0].unlink()
    shutil.rmtree(foreign[1].parent)
    assert await present(again, 10) == [0, 3]
    # Another program removes a file: it is missing, without an error.
    (again.root / f"{layer(3).hex}.tar").unlink()
    assert await again.pin(layer(3)) is None
    assert await again.usage() == 3 * BLOCK
    await again.remove(layer(3))
    await again.remove(layer(0))
    assert await again.pin(layer(0)) is None
    assert not list(again.root.iterdir())


@pytest_twisted.ensureDeferred
async def test_a_restart_knows_when_a_present_layer_was_adopted_again(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
    for number in (0, 1, 0):
        await add_layer(cache, time, number, 1)
    restarted = await LayerCache.open(tmp_path, threads, time)
    await Quota({"layers": restarted}, BLOCK).reclaim()
    assert await present(restarted, 2) == [0]
    # A manually removed file is added again.
    (restarted.root / f"{layer(0).hex}.tar").unlink()
    await add_layer(restarted, time, 0, 1)
    assert await present(restarted, 2) == [0]


@pytest_twisted.ensureDeferred
async def test_the_same_layer_is_adopted_many_times_at_once(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await LayerCache.open(tmp_path, threads, time)
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


class FullOnce(Cache[DiffID]):
    """A disk that reports that it is full at the sync, as with delayed allocation."""

    folder = "cache"

    async def adopt(self, tmp: Path, name: str, times: int) -> None:
        failures = [None] * times

        def prepare(path: Path) -> None:
            if failures:
                failures.pop()
                with files.disk_full_as_error():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        await self._adopt(tmp, name, prepare)


@pytest_twisted.ensureDeferred
async def test_a_full_disk_evicts_other_entries_first(
    tmp_path: Path, threads: Threads, time: Time
) -> None:
    cache = await FullOnce.open(tmp_path, threads, time)
    other = await LayerCache.open(tmp_path, threads, time)
    cache.make_room = Quota({"cache": cache, "layers": other}, 100 * BLOCK).make_room

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
    # The least recently used entry of all kinds is evicted, not one of the same cache.
    await add_layer(other, time, 0, 2)
    await adopt(4, 0)
    time.now += FRESH_SECONDS + 1
    await adopt(5, 1)
    assert len(list(cache.root.iterdir())) == 2
    assert not list(other.root.iterdir())
    assert not list((tmp_path / "tmp").iterdir())


@pytest_twisted.ensureDeferred
async def test_a_tree_keeps_its_times(tmp_path: Path, threads: Threads, time: Time) -> None:
    cache = await TreeCache.open(tmp_path, threads, time)
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
    again = await TreeCache.open(tmp_path, threads, time)
    assert await again.oldest() == time.now
    assert await again.usage() == await cache.usage() > 0
    assert await again.pin(ChainID.of(b"other")) is None
    assert await again.evict_oldest() == await cache.usage()
    assert not list((tmp_path / "trees").iterdir())
    assert not list((tmp_path / "tmp").iterdir())
