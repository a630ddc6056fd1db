"""The quota is enforced when the store grows, and when the disk is full."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted

from obdelta import settings
from obdelta.app.components import open_state
from obdelta.concurrency.tasks import Threads
from obdelta.delta.build import RECIPE
from obdelta.oci import DiffID
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.quota import Evictable, Quota, StoredDeltas
from obdelta.store.quota_service import QuotaService
from tests.support.logs import logged
from tests.support.store import REACTOR, a_key, publish, runtime, some_layers, threads

__all__ = ["threads"]

BLOCK = 4096
DAY = 86400


@pytest_twisted.ensureDeferred
async def test_the_quota_follows_growth_and_keeps_the_grace(
    tmp_path: Path, threads: Threads
) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, lambda: now)
    kinds: dict[str, Evictable] = {
        "deltas": StoredDeltas(catalogue, blobs, DAY, lambda: now),
        "layers": layers,
    }
    service = QuotaService(Quota(kinds, 8 * BLOCK), blobs, catalogue.counters.count)
    service.watch(layers)
    await publish(catalogue, blobs, 1, int(now))
    for number in range(4):
        tmp = blobs.temporary()
        tmp.write_bytes(b"x" * 3 * BLOCK)
        await layers.adopt(tmp, DiffID.of(b"%d" % number), 3 * BLOCK)
        now += FRESH_SECONDS + 1
        await service.wait_until_idle()
        assert await layers.usage() <= 8 * BLOCK
    assert (await catalogue.counters.all())["store.reclaimed_bytes"] >= 6 * BLOCK
    # Whatever the quota is, a device may be pulling that delta.
    assert await catalogue.delta(a_key(1)) is not None
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_content_in_use_above_the_quota_is_evicted_when_it_is_released(
    tmp_path: Path, threads: Threads
) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, lambda: now)
    service = QuotaService(Quota({"layers": layers}, 4 * BLOCK), blobs, catalogue.counters.count)
    service.watch(layers)
    pins = []
    with logged("warn") as lines:
        for number in range(2):
            tmp = blobs.temporary()
            tmp.write_bytes(b"x" * 3 * BLOCK)
            await layers.adopt(tmp, DiffID.of(b"%d" % number), 3 * BLOCK)
            pins.append(await layers.pin(DiffID.of(b"%d" % number)))
            await service.wait_until_idle()
        assert await layers.usage() == 6 * BLOCK
        # A worker process writes an index beside the layer.
        (layers.root / f"{DiffID.of(b'1').hex}.idx").write_bytes(b"i" * BLOCK)
        for pin, left in zip(reversed(pins), (3 * BLOCK, 3 * BLOCK), strict=True):
            assert pin is not None
            pin.release()
            await service.wait_until_idle()
            assert await layers.usage() == left
    assert len(lines) == 1 and "above store-quota stay" in lines[0]
    # Once everything fits, a release starts no pass.
    runs = []
    service.grew = lambda: runs.append(1)  # type: ignore[method-assign]
    pin = await layers.pin(DiffID.of(b"0"))
    assert pin is not None
    pin.release()
    assert not runs
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_a_full_disk_is_reported_until_there_is_space_again(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000.0
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    layers = await LayerCache.open(tmp_path, threads, lambda: now)
    service = QuotaService(Quota({"layers": layers}, 1 << 30), blobs, catalogue.counters.count)
    assert await service.problem() is None
    tmp = blobs.temporary()
    tmp.write_bytes(b"x" * BLOCK)
    await layers.adopt(tmp, DiffID.of(b"x"), BLOCK)
    room = False

    async def has_free_space() -> bool:
        return room

    # tests/faults/test_disk.py fills a file system; this only checks the report.
    monkeypatch.setattr(blobs, "has_free_space", has_free_space)
    assert not await service.make_room()
    assert await service.problem() == "the disk is full"
    now += FRESH_SECONDS + 1
    room = True
    assert await service.make_room()
    assert await layers.usage() == 0
    assert await service.problem() is None
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_one_quota_for_all_kinds(tmp_path: Path, threads: Threads) -> None:
    """There are two of each kind, and space for half of them: those used longer ago are evicted."""
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
        # Deltas of an older recipe would be removed at the start.
        connection.execute("UPDATE deltas SET recipe = ?", (RECIPE,))
    config, layers = some_layers(1)
    older_delta = len(config) + sum(map(len, layers[:-1]))
    newer = [f"layers/{names[1]}.tar", f"upstream/{names[1]}.blob", f"trees/{names[1]}"]
    quota = deltas - older_delta + sum(files.disk_bytes(before / place) for place in newer)
    given = {
        "upstream": "https://registry.example.com",
        "public-url": "https://delta.example.com",
        "auth": "none",
        "state-dir": str(before),
        "store-quota": str(quota),
    }
    process = runtime(settings.read(given, {}), threads)
    state = await open_state(process)
    await state.quota_service.wait_until_idle()
    for kind in ("layers", "upstream", "trees"):
        assert [path.name.partition(".")[0] for path in (before / kind).iterdir()] == [names[1]], (
            kind
        )
    assert [
        await state.catalogue.delta(a_key(number, recipe=RECIPE)) is not None for number in (1, 2)
    ] == [False, True]
    await process.services.stopService()
