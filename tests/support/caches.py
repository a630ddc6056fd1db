"""The layer cache for tests: layers of a given number of blocks, with times set by the test."""

from __future__ import annotations

import pytest

from obdelta.oci import DiffID
from obdelta.store import files
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache

BLOCK = 4096


class Time:
    """A clock that the test sets, in seconds since the epoch."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def layer(number: int) -> DiffID:
    return DiffID.of(b"layer %d" % number)


async def add_layer(cache: LayerCache, time: Time, number: int, blocks: int) -> None:
    """Adopts a layer, and advances the clock by 61 seconds."""
    tmp = cache.root.parent / "tmp" / f"layer{number}"
    tmp.write_bytes(b"x" * (blocks * BLOCK))
    await cache.adopt(tmp, layer(number), blocks * BLOCK)
    assert not tmp.exists()
    time.now += FRESH_SECONDS + 1


async def present(cache: LayerCache, count: int) -> list[int]:
    """Returns the numbers of those first layers that are on disk, and checks that the cache
    agrees.
    """
    present_files = {path.name for path in cache.root.iterdir()}
    found = [number for number in range(count) if f"{layer(number).hex}.tar" in present_files]
    assert present_files == {f"{layer(number).hex}.tar" for number in found} | {
        name for name in present_files if name.endswith(".idx")
    }
    for name in present_files:
        assert name.partition(".")[0] in {layer(number).hex for number in found}
    assert await cache.usage() == sum(files.disk_bytes(path) for path in cache.root.iterdir())
    return found
