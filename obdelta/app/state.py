"""``state-dir``, opened: blobs, catalogue, caches and the quota over them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from obdelta.concurrency.threads import Threads
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.oci import Digest
from obdelta.rsync.batch import out_of_sync
from obdelta.settings import Settings
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.blob_cache import UpstreamBlobCache
from obdelta.store.caches.cache import Cache
from obdelta.store.caches.layer_cache import LayerCache
from obdelta.store.caches.tree_cache import TreeCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.crash_recovery import RunMarker
from obdelta.store.lock import StateLock
from obdelta.store.ownership import CATALOGUE, claim
from obdelta.store.quota import DeltaShelf, Retention, Shelf
from obdelta.store.quota_service import Upkeep

FLEETS = 4
"""Each fleet is sure of one part in this many of the quota for its deltas. Deltas above that part
may be evicted when others need space.
"""
KEPT = frozenset({Digest.of(out_of_sync())})
"""Blobs that belong to no delta."""
Closers = list[Callable[[], Awaitable[object]]]
"""Functions that close what was opened, in the order of opening. They are called in
reverse order.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All stored state."""

    threads: Threads
    blobs: BlobStore
    catalogue: Catalogue
    layers: LayerCache
    trees: TreeCache
    upstream_blobs: UpstreamBlobCache
    upkeep: Upkeep


async def open_state(
    configured: Settings, reactor: Any, threads: Threads, closers: Closers
) -> State:
    """Opens and sweeps the state. Raises CatalogueUnusable, StateInUse, and SettingsError for a
    folder that is not obdelta's or cannot be written.
    """
    try:
        claimed = await threads.run(claim, configured.state_dir)
        lock = StateLock.take(configured.state_dir)
        closers.append(lock.release)
        blobs = BlobStore(configured.state_dir, threads)
    except OSError as error:
        raise SettingsError(
            "state-dir",
            str(configured.state_dir),
            f"a folder that can be written ({error.strerror})",
        ) from error
    claimed.report()
    with _swept(configured):
        await blobs.sweep()
    running = RunMarker(configured.state_dir, threads, reactor)
    closers.append(running.end)
    with _swept(configured):
        await running.begin()
    catalogue = await Catalogue.open(
        configured.state_dir / CATALOGUE, reactor, blobs=blobs, recipe=RECIPE
    )
    closers.append(catalogue.close)
    quota, clock = configured.store_quota, time.time
    await catalogue.correct_times(int(clock()))
    with _swept(configured):
        await catalogue.sweep(blobs, KEPT, recipe=RECIPE, before=int(clock() - configured.grace))
        layers = await LayerCache.open(
            configured.state_dir, threads, configured.layer_cache or quota, clock
        )
        trees = await TreeCache.open(
            configured.state_dir, threads, configured.tree_cache or quota, clock
        )
        fetched = await UpstreamBlobCache.open(
            configured.state_dir, threads, configured.blob_cache or quota, clock
        )
    caches: dict[str, Cache] = {"layers": layers, "trees": trees, "upstream": fetched}
    for cache in caches.values():
        cache.steady = reactor.seconds
    upkeep = make_upkeep(configured, clock, blobs, catalogue, caches, lock)
    closers.append(upkeep.settled)
    return State(
        threads=threads,
        blobs=blobs,
        catalogue=catalogue,
        layers=layers,
        trees=trees,
        upstream_blobs=fetched,
        upkeep=upkeep,
    )


@contextlib.contextmanager
def _swept(configured: Settings) -> Iterator[None]:
    """Raises SettingsError for what keeps a start from removing an earlier run's files."""
    try:
        yield
    except OSError as error:
        raise SettingsError(
            "state-dir",
            str(configured.state_dir),
            "a folder in which obdelta can remove what an earlier run left"
            f" ({files.described(error)}): check its owner and mode, or move it away",
        ) from error


def make_upkeep(
    configured: Settings,
    clock: Callable[[], float],
    blobs: BlobStore,
    catalogue: Catalogue,
    caches: Mapping[str, Cache],
    lock: StateLock,
) -> Upkeep:
    """Returns the quota over everything stored. Caches report their growth to it."""
    ceiling = min(configured.store_quota, configured.delta_cache or configured.store_quota)
    share = ceiling // FLEETS
    deltas = DeltaShelf(catalogue, blobs, int(configured.grace), clock, recipe=RECIPE, share=share)
    limits = {"deltas": configured.delta_cache} if configured.delta_cache is not None else {}
    shelves: dict[str, Shelf] = {"deltas": deltas, **caches}
    upkeep = Upkeep(
        Retention(shelves, configured.store_quota, limits),
        blobs,
        catalogue.count,
        folders=[blobs.tmp, blobs.root, *(cache.root for cache in caches.values())],
        catalogue=configured.state_dir / CATALOGUE,
        lock=lock,
        deltas=deltas,
        ceiling=ceiling,
    )
    for cache in caches.values():
        cache.on_growth = upkeep.grew
    upkeep.grew()
    return upkeep
