"""``state-dir``, opened: blobs, catalogue, caches and the quota over them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from obdelta.app.runtime import Runtime
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
from obdelta.store.catalogue.fleet_bytes import FLEETS
from obdelta.store.crash_recovery import RunMarker
from obdelta.store.lock import StateLock
from obdelta.store.ownership import CATALOGUE, claim
from obdelta.store.quota import Evictable, Quota, StoredDeltas
from obdelta.store.quota_service import QuotaService

KEPT = frozenset({Digest.of(out_of_sync())})
"""Blobs that belong to no delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All stored state."""

    threads: Threads
    blobs: BlobStore
    catalogue: Catalogue
    layers: LayerCache
    trees: TreeCache
    upstream_blobs: UpstreamBlobCache
    quota_service: QuotaService


async def open_state(runtime: Runtime) -> State:
    """Opens and sweeps the state. Raises CatalogueUnusable, StateInUse, and SettingsError for a
    folder that is not obdelta's or cannot be written.
    """
    configured, reactor, threads = runtime.settings, runtime.reactor, runtime.threads
    add_stop = runtime.services.add_stop
    try:
        claimed = await threads.run(claim, configured.state_dir)
        lock = StateLock.take(configured.state_dir)
        add_stop(lock.release)
        blobs = BlobStore(configured.state_dir, threads)
    except OSError as error:
        raise SettingsError(
            "state-dir",
            str(configured.state_dir),
            f"a directory that can be written ({error.strerror})",
        ) from error
    claimed.report()
    with _swept(configured):
        await blobs.sweep()
    catalogue = await Catalogue.open(
        configured.state_dir / CATALOGUE, reactor, blobs=blobs, recipe=RECIPE
    )
    add_stop(catalogue.close)
    running = RunMarker(configured.state_dir, threads, reactor)

    async def known_blobs() -> frozenset[Digest]:
        return await catalogue.blob_digests() | KEPT

    with _swept(configured):
        await running.begin(known_blobs)
    add_stop(running.end)
    clock = time.time
    await catalogue.correct_times(int(clock()))
    with _swept(configured):
        await catalogue.sweep(
            blobs, KEPT, recipe=RECIPE, before=int(clock() - configured.keep_served)
        )
        layers = await LayerCache.open(configured.state_dir, threads, clock)
        trees = await TreeCache.open(configured.state_dir, threads, clock)
        fetched = await UpstreamBlobCache.open(configured.state_dir, threads, clock)
    caches: dict[str, Cache[Any]] = {"layers": layers, "trees": trees, "upstream": fetched}
    for cache in caches.values():
        cache.steady = reactor.seconds
    service = make_quota_service(runtime, blobs, catalogue, caches, lock)
    add_stop(service.wait_until_idle)
    return State(
        threads=threads,
        blobs=blobs,
        catalogue=catalogue,
        layers=layers,
        trees=trees,
        upstream_blobs=fetched,
        quota_service=service,
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
            "a directory in which obdelta can remove what an earlier run left"
            f" ({files.error_for_log(error)}): check its owner and mode, or move it away",
        ) from error


def make_quota_service(
    runtime: Runtime,
    blobs: BlobStore,
    catalogue: Catalogue,
    caches: Mapping[str, Cache[Any]],
    lock: StateLock,
) -> QuotaService:
    """Returns the one quota over deltas and all caches."""
    configured, quota = runtime.settings, runtime.settings.store_quota
    deltas = StoredDeltas(
        catalogue,
        blobs,
        int(configured.keep_served),
        time.time,
        recipe=RECIPE,
        share=quota // FLEETS,
    )
    kinds: dict[str, Evictable] = {"deltas": deltas, **caches}
    service = QuotaService(
        Quota(kinds, quota),
        blobs,
        catalogue.count,
        folders=[blobs.tmp, blobs.root, *(cache.root for cache in caches.values())],
        catalogue=configured.state_dir / CATALOGUE,
        lock=lock,
        deltas=deltas,
        ceiling=quota,
        clock=runtime.reactor,
    )
    for cache in caches.values():
        service.watch(cache)
    service.grew()
    return service
