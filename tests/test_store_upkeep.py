"""The quota is looked after when something grows, and when the disk is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.oci import DiffID
from obdelta.store.blobs import BlobStore
from obdelta.store.cache import FRESH_SECONDS
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import LayerCache
from obdelta.store.retention import DeltaShelf, Retention, Shelf
from obdelta.store.threads import Threads
from obdelta.store.upkeep import Upkeep
from tests.parts.store import REACTOR, a_key, publish, real_threads

BLOCK = 4096
DAY = 86400


@pytest.fixture
def threads() -> Iterator[Threads]:
    with real_threads() as pool:
        yield pool


@pytest_twisted.ensureDeferred
async def test_growth_is_followed_by_the_quota_and_the_grace_is_kept(tmp_path: Path, threads: Threads) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, 1 << 30, lambda: now)
    shelves: dict[str, Shelf] = {"deltas": DeltaShelf(catalogue, blobs, DAY, lambda: now), "layers": layers}
    upkeep = Upkeep(Retention(shelves, 8 * BLOCK), blobs, catalogue.add)
    layers.on_growth = upkeep.grew
    await publish(catalogue, blobs, 1, int(now))
    for number in range(4):
        tmp = blobs.temporary()
        tmp.write_bytes(b"x" * 3 * BLOCK)
        await layers.adopt(tmp, DiffID.of(b"%d" % number), 3 * BLOCK)
        now += FRESH_SECONDS + 1
        await upkeep.settled()
        assert await layers.usage() <= 8 * BLOCK
    assert (await catalogue.counters())["store.reclaimed_bytes"] >= 6 * BLOCK
    # Whatever the quota says, a device may be pulling that delta.
    assert await catalogue.delta(a_key(1)) is not None
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_a_full_disk_is_told_until_there_is_room_again(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, 1 << 30, lambda: now)
    upkeep = Upkeep(Retention({"layers": layers}, 1 << 30), blobs, catalogue.add)
    assert await upkeep.problem() is None
    tmp = blobs.temporary()
    tmp.write_bytes(b"x" * BLOCK)
    await layers.adopt(tmp, DiffID.of(b"x"), BLOCK)
    room = False

    async def has_room() -> bool:
        return room

    # What a full file system does is in test_faults_disk.py; here only whether it is told.
    monkeypatch.setattr(blobs, "has_room", has_room)
    assert not await upkeep.make_room()
    assert await upkeep.problem() == "the disk is full"
    now += FRESH_SECONDS + 1
    room = True
    assert await upkeep.make_room()
    assert await layers.usage() == 0
    assert await upkeep.problem() is None
    await catalogue.close()
