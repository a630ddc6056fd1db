"""Fills a very small disk with a store. Run by the disk-full test with the directory where that
disk is mounted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.internet import defer, task
from twisted.internet.testing import StringTransport
from twisted.python.threadpool import ThreadPool

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.errors import StoreFull
from obdelta.oci import DiffID, Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import Outcome
from obdelta.store.quota import Quota, StoredDeltas
from tests.support.store import a_key, blob_writer, publish

MUCH = 3_000_000
"""A size larger than the disk."""


def fill(state: Path) -> Path:
    """Fills the disk completely."""
    ballast = state / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


async def expect_full(work: Any) -> None:
    """Awaits the call and asserts that it raises StoreFull."""
    try:
        await work
    except StoreFull:
        return
    raise AssertionError(f"{work} did not notice")


async def scenario(reactor: IReactor, state: Path) -> None:
    """Runs every kind of write on a full disk. Each time nothing is left behind, and work
    continues when there is space again.
    """
    # one thread runs calls in order: what was closed before is closed
    pool = ThreadPool(1, 1, "full")
    pool.start()
    try:
        blobs = BlobStore(state, Threads(reactor, pool), reserve=65536)
        await blobs.sweep()
        catalogue = await Catalogue.open(state / "catalogue.sqlite", reactor)
        await publish(catalogue, blobs, 1, 1000)
        await one_write_that_is_too_large(blobs)
        await publish(catalogue, blobs, 2, 2000)
        await not_a_byte_left(reactor, state, blobs, catalogue)
    finally:
        pool.stop()
    print("all went on")


async def one_write_that_is_too_large(blobs: BlobStore) -> None:
    """Checks one write that is too large: it fails, also for its readers, and others continue."""
    await expect_full(blobs.put(b"x" * MUCH))
    writer = blob_writer(blobs)
    reader = StringTransport()
    delivery = writer.deliver(reader)
    await writer.write(b"first")
    await expect_full(writer.write(b"x" * MUCH))
    await expect_full(delivery)
    await expect_full(writer.done())
    assert reader.value() == b"first"
    assert not list(blobs.tmp.iterdir())
    assert await blobs.writable()


async def not_a_byte_left(
    reactor: IReactor, state: Path, blobs: BlobStore, catalogue: Catalogue
) -> None:
    """Leaves no byte for any writer, the catalogue included. Then the quota frees space."""
    now = 10_000.0
    cache = await LayerCache.open(state, blobs.threads, lambda: now)
    layer = blobs.temporary()
    layer.write_bytes(b"l" * 100_000)
    await cache.adopt(layer, DiffID.of(b"l"), 100_000)
    ballast = fill(state)
    await expect_full(blobs.put(b"x" * 5000))
    assert not await blobs.writable()
    writer = blob_writer(blobs)
    await expect_full(writer.write(b"x" * 5000))
    assert not list(blobs.tmp.iterdir())

    async def remember_much() -> None:
        for number in range(1000):
            key = a_key(number)
            await catalogue.failures.remember(
                "v3", key.base, key.target, Outcome.ERROR, "x" * 5000, 1, 10
            )

    await expect_full(remember_much())
    fill(state)
    assert await catalogue.delta(a_key(1)) is not None
    # The layer is new and stays: only deltas can be removed, and that needs a write before it
    # frees anything.
    quota = Quota({"deltas": StoredDeltas(catalogue, blobs, 0, lambda: now), "layers": cache}, MUCH)
    assert await quota.make_room(1) > 0
    assert await catalogue.delta(a_key(1)) is None
    assert await catalogue.delta(a_key(2)) is not None
    now += FRESH_SECONDS + 1
    assert await quota.make_room(100_000) >= 100_000
    assert await blobs.put(b"x" * 5000) == Digest.of(b"x" * 5000)
    ballast.unlink()
    await publish(catalogue, blobs, 3, 3000)
    assert await blobs.writable()
    await catalogue.close()
    again = await Catalogue.open(state / "catalogue.sqlite", reactor)
    assert await again.sweep(blobs) == ([], 1)
    assert await again.delta(a_key(3)) is not None
    assert (state / "reserve").stat().st_size == 65536
    await again.close()


if __name__ == "__main__":
    task.react(lambda reactor: defer.ensureDeferred(scenario(reactor, Path(sys.argv[1]))))
