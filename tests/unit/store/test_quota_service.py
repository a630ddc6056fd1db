"""The quota is looked after when something grows, and when the disk is full."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted

from obdelta import settings
from obdelta.app.state import Closers, open_state
from obdelta.concurrency.threads import Threads
from obdelta.delta.build import RECIPE
from obdelta.oci import DiffID
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.layer_cache import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.quota import DeltaShelf, Retention, Shelf
from obdelta.store.quota_service import Upkeep
from tests.support.store import REACTOR, a_key, publish, real_threads

BLOCK = 4096
DAY = 86400


@pytest.fixture
def threads() -> Iterator[Threads]:
    with real_threads() as pool:
        yield pool


@pytest_twisted.ensureDeferred
async def test_growth_is_followed_by_the_quota_and_the_grace_is_kept(
    tmp_path: Path, threads: Threads
) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, 1 << 30, lambda: now)
    shelves: dict[str, Shelf] = {
        "deltas": DeltaShelf(catalogue, blobs, DAY, lambda: now),
        "layers": layers,
    }
    upkeep = Upkeep(Retention(shelves, 8 * BLOCK), blobs, catalogue.count)
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
    upkeep = Upkeep(Retention({"layers": layers}, 1 << 30), blobs, catalogue.count)
    assert await upkeep.problem() is None
    tmp = blobs.temporary()
    tmp.write_bytes(b"x" * BLOCK)
    await layers.adopt(tmp, DiffID.of(b"x"), BLOCK)
    room = False

    async def has_room() -> bool:
        return room

    # tests/faults/test_disk.py fills a file system; this only checks the report.
    monkeypatch.setattr(blobs, "has_room", has_room)
    assert not await upkeep.make_room()
    assert await upkeep.problem() == "the disk is full"
    now += FRESH_SECONDS + 1
    room = True
    assert await upkeep.make_room()
    assert await layers.usage() == 0
    assert await upkeep.problem() is None
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_the_settings_limit_each_kind(tmp_path: Path, threads: Threads) -> None:
    """Two of each, of eight blocks, and room for twelve: the one that was used longer ago goes."""
    before = tmp_path / "state"
    names = [DiffID.of(b"%d" % number).hex for number in range(2)]
    for age, name in enumerate(names):
        for place in (f"layers/{name}.tar", f"upstream/{name}.blob", f"trees/{name}/root/file"):
            path = before / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * 8 * BLOCK)
        for place in (f"layers/{name}.tar", f"upstream/{name}.blob", f"trees/{name}"):
            os.utime(before / place, (age + 1, age + 1))
    blobs = BlobStore(before, threads)
    catalogue = await Catalogue.open(before / "catalogue.sqlite", REACTOR)
    for number in (1, 2):
        await publish(catalogue, blobs, number, number)
    deltas = (await catalogue.totals()).blob_bytes
    await catalogue.close()
    with closing(sqlite3.connect(before / "catalogue.sqlite")) as connection, connection:
        # Those of an older recipe would go at the start.
        connection.execute("UPDATE deltas SET recipe = ?", (RECIPE,))
    limits = {
        "layer-cache": 12 * BLOCK,
        "blob-cache": 12 * BLOCK,
        "tree-cache": 12 * BLOCK,
        "delta-cache": deltas - 1,
    }
    given = {
        "upstream": "https://registry.example.com",
        "public-url": "https://delta.example.com",
        "auth": "none",
        "state-dir": str(before),
        **{key: str(value) for key, value in limits.items()},
    }
    closers: Closers = []
    state = await open_state(settings.read(given, {}), REACTOR, threads, closers)
    await state.upkeep.settled()
    for kind in ("layers", "upstream", "trees"):
        assert [path.name.partition(".")[0] for path in (before / kind).iterdir()] == [names[1]], (
            kind
        )
    assert [
        await state.catalogue.delta(a_key(number, recipe=RECIPE)) is not None for number in (1, 2)
    ] == [False, True]
    for close in reversed(closers):
        await close()
