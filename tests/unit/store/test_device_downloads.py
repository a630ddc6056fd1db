"""The table of measured downloads: which ones it accepts, its limits, and what a restart keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from obdelta.oci import Digest, Form
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.tables import device_pulls
from obdelta.store.catalogue.tables.device_pulls import (
    KEPT_SECONDS,
    MAX_DEVICES,
    MAX_LAYERS,
    Download,
)
from tests.support.store import REACTOR, a_key, a_manifest, a_row, blobs

__all__ = ["blobs"]

LAYERS = [b"layer %d" % number for number in range(MAX_LAYERS + 4)]
NOW = 1_800_000_000


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Catalogue]:
    catalogue = await Catalogue.open(path / "catalogue.sqlite", REACTOR)
    try:
        yield catalogue
    finally:
        await catalogue.close()


async def publish(
    catalogue: Catalogue, blobs: BlobStore, number: int = 1, **figures: object
) -> None:
    """Publishes a delta of :data:`LAYERS` for v2/base and v2/target."""
    config = b'{"number": %d}' % number
    for content in (config, *LAYERS):
        await blobs.put(content)
    layers = [
        {
            "digest": str(Digest.of(layer)),
            "size": 1000 + place,
            "copies": 10,
            "copied_bytes": 5000,
            "literal_bytes": 600,
            **figures,
        }
        for place, layer in enumerate(LAYERS)
    ]
    manifest = a_manifest(config, LAYERS)
    row = replace(a_row(a_key(number), manifest.digest, NOW), details={"layers": layers})
    await catalogue.publish_v3(row, manifest, blobs)


def a_download(device: str = "subject d_1", layer: int = 0, **changes: Any) -> Download:
    download = Download("v2/target", Digest.of(LAYERS[layer]), device, Form.ZSTD, 12.5)
    return replace(download, **changes)


async def note(catalogue: Catalogue, downloads: Sequence[Download], now: int = NOW) -> None:
    for download in downloads:
        await catalogue.counters.downloaded(download, now)


@pytest_twisted.ensureDeferred
async def test_a_download_is_recorded_with_the_deltas_data_of_its_layer(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await note(catalogue, [a_download(layer=2)])
    async with opened(tmp_path) as catalogue:  # a restart keeps it
        (row,) = await catalogue.device_downloads.all()
    assert (row.base_repository, row.target_repository) == ("v2/base", "v2/target")
    assert (row.engine, row.size, row.commands, row.target_size, row.seconds) == (
        Form.ZSTD,
        1002,
        20,
        5600,
        12.5,
    )
    assert "d_1" not in row.device


@pytest_twisted.ensureDeferred
async def test_the_number_of_commands_is_taken_where_it_was_recorded(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs, literals=7)
        await note(catalogue, [a_download()])
        assert [row.commands for row in await catalogue.device_downloads.all()] == [17]


@pytest_twisted.ensureDeferred
async def test_other_blobs_than_layers_of_deltas_are_not_recorded(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await note(
            catalogue,
            [
                replace(a_download(), layer=Digest.of(b'{"number": 1}')),
                a_download(repository="other"),
            ],
        )
        assert await catalogue.device_downloads.all() == []


@pytest_twisted.ensureDeferred
async def test_a_device_has_one_row_a_layer_and_few_layers(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await note(catalogue, [a_download(seconds=1.0)])
        await note(catalogue, [a_download(seconds=2.0)], NOW + 1)
        assert [row.seconds for row in await catalogue.device_downloads.all()] == [2.0]
        for number in range(len(LAYERS)):
            await note(catalogue, [a_download(layer=number)], NOW + 2 + number)
        rows = await catalogue.device_downloads.all()
        assert [row.size - 1000 for row in rows] == list(range(4, MAX_LAYERS + 4))


@pytest_twisted.ensureDeferred
async def test_the_first_devices_vote_and_later_ones_displace_none(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await note(
            catalogue, [a_download(f"subject d_{number}") for number in range(MAX_DEVICES + 10)]
        )
        first = await catalogue.device_downloads.all()
        assert len(first) == MAX_DEVICES
        await note(
            catalogue,
            [
                a_download("late", seconds=99.0),
                a_download("other engine", engine=Form.GZIP),
                a_download("subject d_7", layer=1),
            ],
        )
        rows = await catalogue.device_downloads.all()
        assert len(rows) == MAX_DEVICES + 2
        assert 99.0 not in {row.seconds for row in rows}


@pytest_twisted.ensureDeferred
async def test_the_table_is_bounded(
    blobs: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_pulls, "MAX_DOWNLOADS", 5)
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        for number in range(9):
            await note(catalogue, [a_download(f"d{number}", seconds=1.0 + number)], NOW + number)
        rows = await catalogue.device_downloads.all()
        assert [row.seconds for row in rows] == [5.0, 6.0, 7.0, 8.0, 9.0]


@pytest_twisted.ensureDeferred
async def test_a_full_table_is_shared_by_the_targets(
    blobs: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices of another fleet cannot displace this fleet's measurements."""
    monkeypatch.setattr(device_pulls, "MAX_DOWNLOADS", 6)
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await catalogue.publish_for(a_key(1), "v2/base", "v2/theirs")
        await note(catalogue, [a_download(f"d{number}") for number in range(3)])
        for number in range(20):
            other_fleet = a_download(
                f"theirs {number}", repository="v2/theirs", seconds=1.0 + number
            )
            await note(catalogue, [other_fleet], NOW + number)
        rows = await catalogue.device_downloads.all()
        assert [row.seconds for row in rows] == [12.5, 12.5, 12.5, 18.0, 19.0, 20.0]


@pytest_twisted.ensureDeferred
async def test_rows_expire(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        await publish(catalogue, blobs)
        await note(catalogue, [a_download()])
        assert (await catalogue.expire(NOW + KEPT_SECONDS - 1, 60))["device_downloads"] == 0
        assert (await catalogue.expire(NOW + KEPT_SECONDS, 60))["device_downloads"] == 1
        assert await catalogue.device_downloads.all() == []
