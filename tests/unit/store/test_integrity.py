"""The catalogue finds deltas only if their files are there."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred, gatherResults

from obdelta.errors import Cancelled, CatalogueUnusable
from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Outcome
from tests.support.logs import logged
from tests.support.store import REACTOR, a_key, a_row, blobs, opened, publish, some_layers

__all__ = ["blobs"]
BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


@asynccontextmanager
async def guarded(directory: Path, blobs: BlobStore) -> AsyncIterator[Catalogue]:
    """Opens it like a server."""
    catalogue = await Catalogue.open(directory / "catalogue.sqlite", REACTOR, blobs=blobs, recipe=1)
    try:
        yield catalogue
    finally:
        await catalogue.close()


def change(directory: Path, script: str) -> None:
    with closing(sqlite3.connect(directory / "catalogue.sqlite")) as connection:
        connection.executescript(script)


@pytest.mark.parametrize("how", ["removed", "cut short"])
@pytest_twisted.ensureDeferred
async def test_a_delta_is_found_only_if_its_files_are_there(
    blobs: BlobStore, tmp_path: Path, how: str
) -> None:
    def spoil(content: bytes) -> None:
        path = blobs.path(Digest.of(content))
        assert path is not None
        if how == "removed":
            path.unlink()
        else:
            os.truncate(path, 1)

    async with guarded(tmp_path, blobs) as catalogue:
        config, layers = some_layers(1)
        for part in (config, *layers):
            await publish(catalogue, blobs, 1, 1000)
            assert await catalogue.delta(a_key(1)) is not None
            spoil(part)
            with logged("warn") as lines:
                assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") is None
            assert lines == [
                f"the v3 delta from {a_key(1).base} to {a_key(1).target} has missing or damaged"
                " files: it is built again on request"
            ]
            assert await catalogue.delta(a_key(1)) is None
        # Layers that this recipe can rebuild are only recorded as evicted.
        row = await publish(catalogue, blobs, 1, 1000)
        change(
            tmp_path,
            """UPDATE deltas SET details = '{"effort": "fast", "common": 0}' WHERE kind = 'v3'""",
        )
        spoil(layers[0])
        found = await catalogue.delta(a_key(1))
        assert found is not None and found.content == row.content
        assert await catalogue.evictions.is_evicted(Digest.of(layers[0]))
        spoil(layers[1])
        assert await catalogue.lost(Digest.of(layers[1]))
        assert {
            one.effort
            for one in await catalogue.evictions.of_blob("v2/target", Digest.of(layers[1]))
        } == {"fast"}
        # A config cannot be rebuilt alone: all of the delta is built again.
        spoil(config)
        assert not await catalogue.lost(Digest.of(config))
        assert await catalogue.delta(a_key(1)) is None
        await blobs.put(b"batch")
        await catalogue.publish_v2(a_row(a_key(2, "v2"), Digest.of(b"batch"), 1000, 5), blobs)
        assert await catalogue.delta(a_key(2, "v2")) is not None
        spoil(b"batch")
        assert await catalogue.delta(a_key(2, "v2")) is None


@pytest.mark.parametrize(
    "damage",
    [
        "PRAGMA foreign_keys = OFF; DELETE FROM manifests",
        "UPDATE manifests SET raw = x'7b7d'",
        "UPDATE blobs SET size = size + 1",
        "PRAGMA foreign_keys = OFF; DELETE FROM manifest_blobs",
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_delta_that_the_catalogue_has_in_part_is_not_found(
    blobs: BlobStore, tmp_path: Path, damage: str
) -> None:
    async with guarded(tmp_path, blobs) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        change(tmp_path, damage)
        assert await catalogue.delta(a_key(1)) is None
        assert await catalogue.manifest("v2/target", row.content) is None


@pytest_twisted.ensureDeferred
async def test_later_damage_is_named(blobs: BlobStore, tmp_path: Path) -> None:
    await blobs.put(b"batch")
    async with opened(tmp_path) as catalogue:
        # More bytes than SQLite keeps in memory.
        for number in range(12):
            row = a_row(a_key(number, "v2"), Digest.of(b"batch"), 1000, 5)
            await catalogue.publish_v2(replace(row, details={"members": "x" * 500_000}), blobs)
    path = tmp_path / "catalogue.sqlite"
    async with opened(tmp_path) as catalogue:
        with path.open("r+b") as file:
            for page in range(1, path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xa5" * 4096)
        with pytest.raises(CatalogueUnusable, match="damaged"):
            await catalogue.recent(100)


@pytest_twisted.ensureDeferred
async def test_two_processes_may_share_the_file(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as two:
        row = await publish(one, blobs, 1, 1000)
        assert await two.delta(a_key(1)) == row
        work: list[Deferred[Any]] = []
        for index in range(50):
            work += [one.counters.add("n"), two.counters.add("n")]
            if index % 10 == 0:
                work.append(two.counters.served(row.content, 2000 + index))
            # Reads, then writes: no process may have read a value that the other was about to
            # change.
            for catalogue in (one, two):
                failing = catalogue.failures.remember(
                    "v3", BASE, TARGET, Outcome.ERROR, "died", 100, 60
                )
                work.append(ensureDeferred(failing))
        await gatherResults(work)
        failure = await one.failures.find("v3", BASE, TARGET, 100, 60)
        assert failure is not None
        assert failure.count == 100
        assert (await one.counters.all())["n"] == 100
        found: DeltaRow | None = await one.delta(a_key(1))
        assert found is not None
        assert (found.served, found.last_served) == (5, 2040)


@pytest_twisted.ensureDeferred
async def test_a_closed_catalogue_is_a_clear_error(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    await catalogue.close()
    await catalogue.close()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.totals()
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.counters.add("n")
    with pytest.raises(Cancelled, match="closed"):
        await catalogue.failures.forget("v3", BASE, TARGET)
