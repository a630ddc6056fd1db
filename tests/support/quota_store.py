"""A store with a catalogue for tests of the quota, and the bytes of its deltas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from obdelta.concurrency.tasks import Threads
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from tests.support.store import REACTOR, some_layers


@asynccontextmanager
async def a_store(tmp_path: Path, threads: Threads) -> AsyncIterator[tuple[BlobStore, Catalogue]]:
    blobs = BlobStore(tmp_path, threads)
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    try:
        yield blobs, catalogue
    finally:
        await catalogue.close()


def own_bytes(number: int) -> int:
    config, layers = some_layers(number)
    return len(config) + sum(map(len, layers[:-1]))


SHARED = len(some_layers(0)[1][-1])
