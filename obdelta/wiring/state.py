"""``state-dir``, opened: what is kept, and the caches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from obdelta.errors import SettingsError
from obdelta.settings import Settings
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import LayerCache
from obdelta.store.threads import Threads
from obdelta.store.trees import TreeCache

Closers = list[Callable[[], Awaitable[object]]]
"""What ends what was opened, in the order of opening: called in the reverse order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that is kept."""

    threads: Threads
    blobs: BlobStore
    catalogue: Catalogue
    layers: LayerCache
    trees: TreeCache


async def open_state(configured: Settings, reactor: Any, threads: Threads, closers: Closers) -> State:
    """Opens and sweeps. Raises SettingsError for a folder that cannot be written, CatalogueUnusable."""
    try:
        blobs = BlobStore(configured.state_dir, threads)
    except OSError as error:
        raise SettingsError(
            "state-dir", str(configured.state_dir), f"a folder that can be written ({error.strerror})"
        ) from error
    await blobs.sweep()
    catalogue = await Catalogue.open(configured.state_dir / "catalogue.sqlite", reactor)
    closers.append(catalogue.close)
    await catalogue.sweep(blobs)
    return State(
        threads=threads,
        blobs=blobs,
        catalogue=catalogue,
        layers=await LayerCache.open(configured.state_dir, threads, configured.layer_cache, reactor.seconds),
        trees=await TreeCache.open(configured.state_dir, threads, configured.layer_cache, reactor.seconds),
    )
