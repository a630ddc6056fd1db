"""The catalogue: publishing of deltas."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.errors import BlobUnknown, SizeMismatch
from obdelta.oci import Descriptor, Digest
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import ManifestRow, Totals
from tests.support.store import a_key, a_manifest, a_row, blobs, opened, publish, some_layers

__all__ = ["blobs"]

BASE, TARGET = Digest.of(b"base"), Digest.of(b"target")


@pytest_twisted.ensureDeferred
async def test_a_published_delta_is_found_by_all_its_names(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.delta(a_key(1)) is None
        row = await publish(catalogue, blobs, 1, 1000)
    config, layers = some_layers(1)
    manifest = a_manifest(config, layers)
    async with opened(tmp_path) as catalogue:
        assert await catalogue.delta(a_key(1)) == row
        assert (row.created, row.last_served, row.served, row.details) == (
            1000,
            1000,
            0,
            {"layers": [1, 2]},
        )
        assert row.tag is not None
        assert await catalogue.delta_tagged("v2/target", row.tag) == row
        assert await catalogue.tagged("v2/target", row.tag) == manifest.digest
        assert await catalogue.manifest("v2/target", manifest.digest) == ManifestRow(
            manifest.digest, DOCKER_MANIFEST, manifest.raw, frozenset({"v2/base"})
        )
        assert await catalogue.blob("v2/target", Digest.of(config)) == Descriptor(
            DOCKER_CONFIG, Digest.of(config), len(config)
        )
        assert await catalogue.blob("v2/target", Digest.of(layers[0])) == Descriptor(
            DOCKER_LAYER, Digest.of(layers[0]), len(layers[0])
        )
        # It is not visible in any other repository, not even in the base's.
        for repository in ("v2/base", "v2/other", ""):
            assert await catalogue.tagged(repository, row.tag) is None
            assert await catalogue.manifest(repository, manifest.digest) is None
            assert await catalogue.blob(repository, Digest.of(config)) is None
        assert await catalogue.tagged("v2/target", "delta-0") is None
        assert await catalogue.delta(replace(a_key(1), recipe=2)) is None
        assert await catalogue.totals() == Totals(1, 4, sum(map(len, layers)) + len(config))


@pytest_twisted.ensureDeferred
async def test_nothing_is_visible_unless_all_blobs_are_there(
    blobs: BlobStore, tmp_path: Path
) -> None:
    config, layers = some_layers(1)
    manifest = a_manifest(config, layers)
    row = a_row(a_key(1), manifest.digest, 1000)
    async with opened(tmp_path) as catalogue:
        for content in (config, *layers):
            with pytest.raises(BlobUnknown):
                await catalogue.publish_v3(row, manifest, blobs)
            assert await catalogue.totals() == Totals(0, 0, 0)
            assert await catalogue.manifest("v2/target", manifest.digest) is None
            await blobs.put(content)
        path = blobs.path(Digest.of(config))
        assert path is not None
        os.truncate(path, 3)
        with pytest.raises(SizeMismatch):
            await catalogue.publish_v3(row, manifest, blobs)
        await blobs.put(config)
        await catalogue.publish_v3(row, manifest, blobs)
        with pytest.raises(ValueError, match="not this manifest"):
            await catalogue.publish_v3(replace(row, content=BASE), manifest, blobs)
        with pytest.raises(ValueError, match="not of a batch"):
            await catalogue.publish_v2(row, blobs)


@pytest_twisted.ensureDeferred
async def test_the_same_pair_of_contents_in_other_repositories(
    blobs: BlobStore, tmp_path: Path
) -> None:
    async with opened(tmp_path) as catalogue:
        assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") is None
        row = await publish(catalogue, blobs, 1, 1000)
        assert row.tag is not None
        assert await catalogue.publish_for(a_key(1), "v2/base", "v2/target") == row
        assert await catalogue.publish_for(a_key(1), "fork/base", "fork/target") == row
        assert await catalogue.publish_for(a_key(1), "other/base", "fork/target") == row
        assert await catalogue.tagged("fork/target", row.tag) == row.content
        found = await catalogue.manifest("fork/target", row.content)
        assert found is not None
        assert found.base_repositories == {"fork/base", "other/base"}
        found = await catalogue.manifest("v2/target", row.content)
        assert found is not None
        assert found.base_repositories == {"v2/base"}


@pytest_twisted.ensureDeferred
async def test_publishing_a_key_again_keeps_the_first(blobs: BlobStore, tmp_path: Path) -> None:
    async with opened(tmp_path) as catalogue:
        row = await publish(catalogue, blobs, 1, 1000)
        config, layers = some_layers(2)
        for content in (config, *layers):
            await blobs.put(content)
        other = a_manifest(config, layers)
        again = replace(
            a_row(a_key(1), other.digest, 2000),
            base_repository="fork/base",
            target_repository="fork/target",
        )
        assert await catalogue.publish_v3(again, other, blobs) == row
        assert row.tag is not None
        assert await catalogue.tagged("fork/target", row.tag) == row.content
        assert await catalogue.manifest("fork/target", other.digest) is None
        # Another key of the same tag would mean two contents under one name.
        clash = replace(a_row(a_key(2), other.digest, 2000), tag=row.tag)
        with pytest.raises(sqlite3.IntegrityError):
            await catalogue.publish_v3(clash, other, blobs)
        assert (await catalogue.totals()).deltas == 1


@pytest_twisted.ensureDeferred
async def test_a_batch_is_published_as_a_blob(blobs: BlobStore, tmp_path: Path) -> None:
    key = a_key(1, "v2")
    row = a_row(key, Digest.of(b"batch"), 1000, 5)
    async with opened(tmp_path) as catalogue:
        with pytest.raises(BlobUnknown):
            await catalogue.publish_v2(row, blobs)
        await blobs.put(b"batch")
        with pytest.raises(SizeMismatch):
            await catalogue.publish_v2(replace(row, delta_bytes=6), blobs)
        assert await catalogue.publish_v2(row, blobs) == row
        assert await catalogue.publish_v2(row, blobs) == row
        assert await catalogue.delta(key) == row
        assert await catalogue.manifest("v2/target", row.content) is None
        assert await catalogue.blob("v2/target", row.content) is None
        assert await catalogue.sweep(blobs) == ([], 0)
        assert await catalogue.remove([key], blobs) == 5
        assert blobs.path(row.content) is None


def test_a_row_has_a_tag_where_it_needs_one() -> None:
    with pytest.raises(ValueError, match="has a tag"):
        replace(a_row(a_key(1, "v2"), BASE, 0), tag="delta-0")
