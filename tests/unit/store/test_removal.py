"""The catalogue: downloads, removal, sweeps and evictions."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, gatherResults

from obdelta.oci import DiffID, Digest, Form
from obdelta.oci.manifest import DOCKER_LAYER
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import fleet_bytes, queries
from obdelta.store.catalogue.database import schema_steps
from obdelta.store.catalogue.evictions import Protection, oldest
from obdelta.store.catalogue.records import LayerRow, Totals
from obdelta.store.catalogue.tables.counters import Served
from tests.support.logs import logged
from tests.support.store import a_key, a_manifest, a_row, blobs, opened, publish, some_layers

__all__ = ["blobs"]
BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


@pytest_twisted.ensureDeferred
async def test_many_downloads_are_counted_in_few_transactions(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        watcher = sqlite3.connect(tmp_path / "catalogue.sqlite")
        (frames,) = watcher.execute("PRAGMA data_version").fetchone()
        size = (tmp_path / "catalogue.sqlite-wal").stat().st_size
        await gatherResults(
            [catalogue.counters.served(row.content, 2000 + index % 7) for index in range(2000)]
            + [catalogue.counters.add("full_pull.gone", 2) for _ in range(500)]
        )
        assert watcher.execute("PRAGMA data_version").fetchone() != (frames,)
        watcher.close()
        # A transaction takes some pages of the log; 2,500 of them would take megabytes.
        assert (tmp_path / "catalogue.sqlite-wal").stat().st_size - size < 200_000
        after = await catalogue.delta(a_key(1))
        assert after == replace(row, served=2000, last_served=2006)
        served = {
            "served.v3.deltas": 2000,
            "served.v3.full_bytes": 2000 * row.full_bytes,
            "served.v3.delta_bytes": 2000 * row.delta_bytes,
        }
        assert await catalogue.counters.all() == {
            "full_pull.gone": 1000,
            "form.gzip": 2000,
            **served,
        }
        assert await catalogue.counters.served_since(0, 1) == [
            Served(0, 2000, served["served.v3.full_bytes"], served["served.v3.delta_bytes"])
        ]
        await catalogue.counters.served(row.content, 1500)
        assert await catalogue.delta(a_key(1)) == replace(row, served=2001, last_served=2006)
        await catalogue.counters.served(BASE, 9999)
        wait = catalogue.counters.add("cancelled")
        wait.cancel()
        with pytest.raises(CancelledError):
            await wait
        last = catalogue.counters.add("late")
    await last
    async with opened(tmp_path) as catalogue:
        counters = await catalogue.counters.all()
        assert {"full_pull.gone": 1000, "cancelled": 1, "late": 1}.items() <= counters.items()
        assert counters["served.v3.deltas"] == 2001


@pytest_twisted.ensureDeferred
async def test_removing_keeps_blobs_that_others_need(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        rows = [await publish(catalogue, blobs, number, 1000 + number) for number in range(4)]
        await catalogue.counters.served(rows[0].content, 5000)
        next_ = await catalogue.evictions.oldest_whole(Protection(1003, 1003, -1, 9999))
        assert next_ is not None and next_.key == a_key(1)
        assert [row.key for row in await catalogue.recent(2)] == [a_key(3), a_key(2)]
        config, layers = some_layers(1)
        shared = Digest.of(layers[-1])
        # Later counts stay, also those of the same moment.
        writes = [catalogue.counters.served(rows[number].content, 6000) for number in (3, 1)]
        assert (
            await catalogue.remove([a_key(1)], blobs, unless=Protection(1003, 1003, 1, 6000)) == 0
        )
        await gatherResults(writes)
        assert await catalogue.delta(a_key(1)) is not None
        freed = await catalogue.remove([a_key(1), a_key(77)], blobs)
        assert freed == len(config) + sum(map(len, layers[:-1]))
        assert await catalogue.delta(a_key(1)) is None
        assert await catalogue.manifest("v2/target", rows[1].content) is None
        assert await catalogue.blob("v2/target", Digest.of(config)) is None
        assert blobs.path(Digest.of(config)) is None
        assert blobs.path(shared) is not None
        assert await catalogue.manifest("v2/target", rows[2].content) is not None
        # A pinned blob (about to be published again) outlives its delta, and can be published.
        config, layers = some_layers(2)
        with blobs.pin(Digest.of(config)):
            await catalogue.remove([a_key(2)], blobs)
            assert blobs.path(Digest.of(config)) is not None
            assert blobs.path(Digest.of(layers[0])) is None
        await publish(catalogue, blobs, 2, 7000)
        await catalogue.remove([row.key for row in rows], blobs)
        assert await catalogue.totals() == Totals(0, 0, 0)
        assert not list(blobs.digests())


@pytest_twisted.ensureDeferred
async def test_two_recipes_may_share_one_manifest(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        config, layers = some_layers(1)
        newer = replace(a_row(a_key(1, recipe=2), row.content, 2000), delta_bytes=row.delta_bytes)
        assert newer.tag != row.tag
        await catalogue.publish_v3(newer, a_manifest(config, layers), blobs)
        assert await catalogue.remove([row.key], blobs) == 0
        assert await catalogue.manifest("v2/target", row.content) is not None
        assert await catalogue.blob("v2/target", Digest.of(config)) is not None
        assert await catalogue.remove([newer.key], blobs) > 0


@pytest_twisted.ensureDeferred
async def test_the_sweep_repairs_losses_of_the_disk_and_leftovers_of_kills(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        rows = [await publish(catalogue, blobs, number, 1000) for number in range(4)]
        await blobs.put(b"batch")
        batch = await catalogue.publish_v2(
            a_row(a_key(9, "v2"), Digest.of(b"batch"), 1000, 5), blobs
        )
        orphan, kept, pinned = [
            await blobs.put(content) for content in (b"orphan", b"kept", b"pinned")
        ]
        lost = blobs.path(Digest.of(some_layers(0)[0]))
        short = blobs.path(Digest.of(some_layers(1)[1][0]))
        gone = blobs.path(batch.content)
        assert lost is not None
        assert short is not None
        assert gone is not None
        lost.unlink()
        gone.unlink()
        os.truncate(short, 5)
        with blobs.pin(pinned):
            keys, files = await catalogue.sweep(blobs, frozenset({kept}))
        assert set(keys) == {a_key(0), a_key(1), a_key(9, "v2")}
        assert files == 1
        assert blobs.path(orphan) is None
        assert blobs.path(kept) is not None
        assert blobs.path(pinned) is not None
        for row in rows[2:]:
            assert await catalogue.manifest("v2/target", row.content) is not None
        assert await catalogue.sweep(blobs) == ([], 2)
        expected = {
            Digest.of(content) for number in (2, 3) for content in _all(some_layers(number))
        }
        assert set(blobs.digests()) == expected
        assert (await catalogue.totals()).blobs == len(expected)


def _all(parts: tuple[bytes, list[bytes]]) -> list[bytes]:
    return [parts[0], *parts[1]]


@pytest_twisted.ensureDeferred
async def test_the_sweep_removes_only_known_blobs_and_those_that_match_their_name(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        config, layers = some_layers(1)
        evicted = Digest.of(layers[0])
        orphan = await blobs.put(b"orphan")
        protection = Protection(2000, 2000, 1, 3000)
        await catalogue.evictions.evict_layers(row, blobs, protection)
        wanted = [Digest.of(content) for content in (b"wanted later", b"never")]
        for digest in (*wanted, evicted):
            place = blobs._place(digest)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(b"not wanted!!")
        with logged("warn") as lines:
            assert await catalogue.sweep(blobs) == ([], 2)
        (line,) = lines
        assert "blobs/ holds 2 files that no delta refers to" in line
        assert all(digest.hex in line for digest in wanted) and evicted.hex not in line
        assert blobs.path(orphan) is None and blobs.path(evicted) is None
        assert blobs.path(Digest.of(config)) is not None
        # A blob with the name of such a file, and its length, is still stored.
        for _ in range(2):
            await blobs.put(b"wanted later")
        place = blobs._place(wanted[0])
        assert place.read_bytes() == b"wanted later"
        (aside,) = place.parent.glob(f"{wanted[0].hex}.*")
        assert aside.read_bytes() == blobs._place(wanted[1]).read_bytes() == b"not wanted!!"


@pytest_twisted.ensureDeferred
async def test_each_form_of_a_pair_is_a_delta_of_its_own(blobs: BlobStore, tmp_path: Path) -> None:
    config, layers = some_layers(1)
    async with opened(tmp_path) as catalogue:
        gzip = await publish(catalogue, blobs, 1, 1000)
        tag = f"{gzip.tag}-zstd"
        for content in (config, b"smaller"):
            await blobs.put(content)
        manifest = a_manifest(config, [b"smaller"], Form.ZSTD)
        # The other form is built after gzip.
        row = replace(a_row(a_key(1, form=Form.ZSTD), manifest.digest, 1000), tag=tag)
        row = replace(row, created=gzip.created + 2)
        zstd = await catalogue.publish_v3(row, manifest, blobs)
        assert zstd.key.form is Form.ZSTD and zstd.key != gzip.key
        assert await catalogue.delta(gzip.key) == gzip
        assert await catalogue.delta(zstd.key) == zstd
        assert gzip.tag is not None
        assert await catalogue.tagged("v2/target", tag, gzip.tag) == zstd.content
        assert await catalogue.tagged("v2/target", gzip.tag) == gzip.content
        assert await catalogue.between("v3", "v2/base", "v2/target") == gzip
        assert await catalogue.between("v3", "v2/base", "v2/target", form=Form.ZSTD) == zstd
        for digest in (manifest.digest, manifest.config.digest):
            assert await catalogue.target_of("v2/target", digest) == gzip.key.target
        await catalogue.remove([gzip.key], blobs)
        assert await catalogue.tagged("v2/target", tag, gzip.tag) == zstd.content
        assert await catalogue.tagged("v2/target", gzip.tag) is None
        assert await catalogue.between("v3", "v2/base", "v2/target") == zstd
        assert blobs.size(Digest.of(layers[0])) is None
        assert blobs.size(Digest.of(config)) == len(config)


@pytest_twisted.ensureDeferred
async def test_a_layer_is_recorded_once_and_for_all(tmp_path: Path) -> None:
    row = LayerRow(BASE, 100, DiffID(TARGET.hex), 1000, DOCKER_LAYER)
    async with opened(tmp_path) as catalogue:
        assert await catalogue.layer(BASE) is None
        await catalogue.record_layer(row)
        await catalogue.record_layer(replace(row, diff_id=DiffID(BASE.hex)))
        assert await catalogue.layer(BASE) == row


def steps_of_eviction(directory: Path, count: int) -> int:
    """Counts SQLite's steps, in hundreds, of one eviction among this number of deltas, half of
    them evicted.
    """
    path = directory / f"{count}.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for step in schema_steps():
            connection.executescript(step)
        connection.execute("BEGIN")
        for number in range(count):
            config, layers = some_layers(number)
            manifest = a_manifest(config, layers)
            queries.insert_manifest(connection, manifest)
            row = replace(
                a_row(a_key(number), manifest.digest, number),
                details={"effort": "fast", "common": 0},
                served=1,
                base_repository=f"v2/{number}",
                target_repository=f"v2/{number + 1}",
            )
            queries.insert_delta(connection, row)
            queries.insert_publication(
                connection, row.key, row.base_repository, row.target_repository
            )
            if number < count // 2:
                parts = [(part.digest.hex,) for part in manifest.layers[:-1]]
                connection.executemany("UPDATE blobs SET evicted = 1 WHERE digest = ?", parts)
        connection.execute("COMMIT")
        steps = 0

        def stepped() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(stepped, 100)
        assert len(fleet_bytes.excess(connection, 1, count + 1, 2 * count)) == count - count // 2
        assert oldest(connection, Protection(count + 1, count + 1, 1, 2 * count)) is not None
        return steps


def test_the_work_of_an_eviction_grows_no_faster_than_the_deltas(tmp_path: Path) -> None:
    assert steps_of_eviction(tmp_path, 400) < 3 * steps_of_eviction(tmp_path, 200)
