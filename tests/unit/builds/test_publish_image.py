"""Which forms of a finished delta are published."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from obdelta.builds.delta_size_limit import DeltaTooLarge, OtherFormCostsLess
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.publish.publish_image import DeltaImages
from obdelta.builds.types import Pair
from obdelta.oci import (
    Descriptor,
    DiffID,
    Digest,
    Form,
    ImageConfig,
    Manifest,
    parse_config,
    parse_manifest,
)
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow
from tests.support.store import REACTOR, real_threads

FULL = 100_000
"""Bytes of the target's layer."""


def image(name: str) -> tuple[ResolvedImage, ImageConfig]:
    config = parse_config(
        json.dumps(
            {
                "architecture": "arm64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [str(DiffID.of(name.encode()))]},
            }
        ).encode()
    )
    layer = Descriptor(DOCKER_LAYER, Digest.of(name.encode()), FULL)
    raw = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {
                "mediaType": DOCKER_CONFIG,
                "size": len(config.raw),
                "digest": str(Digest.of(config.raw)),
            },
            "layers": [
                {"mediaType": DOCKER_LAYER, "size": layer.size, "digest": str(layer.digest)}
            ],
        }
    ).encode()
    manifest = parse_manifest(raw, DOCKER_MANIFEST)
    assert isinstance(manifest, Manifest)
    return ResolvedImage(f"v2/{name}", manifest), config


@asynccontextmanager
async def publishing(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[DeltaRow]]]:
    """Gives a function that publishes a delta of a form with so many bytes and commands."""
    (base, base_config), (target, target_config) = image("base"), image("target")
    with real_threads() as threads:
        blobs = BlobStore(tmp_path, threads)
        catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
        images = DeltaImages(clock=Clock(), blobs=blobs, catalogue=catalogue, max_delta_ratio=0.9)

        async def publish(
            form: Form, size: int, commands: int, price: float, **details: Any
        ) -> DeltaRow:
            pair = Pair("v3", 1, base, target, form)
            path = blobs.temporary(form.value)
            path.write_bytes(form.value.encode() + bytes(size - 4))
            result = {
                "path": str(path),
                "digest": str(Digest.of(path.read_bytes())),
                "size": size,
                "diff_id": str(DiffID.of(form.value.encode())),
                "target": str(target_config.diff_ids[0]),
                "copies": commands // 2,
                "literals": commands - commands // 2,
            }
            # An older engine runs a command in less time.
            prices = {"gzip": price * 0.4, "zstd": price}
            row = await images.publish(
                pair, base_config, target_config, [], [result], 0.0, prices=prices, **details
            )
            assert await images.known(pair) == row
            return row

        try:
            yield publish
        finally:
            await catalogue.close()


@pytest.mark.parametrize(
    ("gzip", "zstd", "price", "gzip_is_better"),
    [
        ((9_000, 100), (8_000, 100), 0.0, False),
        ((8_000, 100), (9_000, 100), 0.0, True),  # metered: bytes alone count
        ((8_000, 1_000), (9_000, 100), 0.0, True),
        ((8_000, 1_000), (9_000, 100), 25.0, False),  # commands cost the device more
        ((8_000, 100), (9_000, 100), 25.0, True),
        # The config counts, too: zstd has the longer one.
        ((9_000, 100), (8_900, 100), 25.0, False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_zstd_that_costs_more_than_the_gzip_there_is_is_not_published(
    gzip: tuple[int, int],
    zstd: tuple[int, int],
    price: float,
    gzip_is_better: bool,
    tmp_path: Path,
) -> None:
    async with publishing(tmp_path) as publish:
        await publish(Form.GZIP, *gzip, price)
        if gzip_is_better:
            with pytest.raises(OtherFormCostsLess):
                await publish(Form.ZSTD, *zstd, price)
            # An evicted one is rebuilt in any case: devices know its name.
            await publish(Form.ZSTD, *zstd, price, any_size=True)
        else:
            await publish(Form.ZSTD, *zstd, price)


@pytest.mark.parametrize("form", Form)
@pytest_twisted.ensureDeferred
async def test_each_form_is_published_alone_or_too_large_alone(form: Form, tmp_path: Path) -> None:
    async with publishing(tmp_path) as publish:
        (other,) = set(Form) - {form}
        with pytest.raises(DeltaTooLarge):
            await publish(other, 95_000, 9_000, 25.0)
        assert (await publish(form, 9_000, 100, 25.0)).key.form is form
