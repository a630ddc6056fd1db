"""The quota against a model: deltas and layers come, are used and pinned, time passes, and the
process restarts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest_twisted
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.defer import ensureDeferred
from twisted.internet.threads import blockingCallFromThread

from obdelta.concurrency.tasks import Threads
from obdelta.oci import DiffID, Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.cache import FRESH_SECONDS
from obdelta.store.caches.digest_caches import LayerCache, PinnedLayer
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.quota import Quota, StoredDeltas
from tests.support.store import REACTOR, a_key, a_manifest, publish, run_model, some_layers

T = TypeVar("T")
BLOCK = 4096
GRACE = 300
DELTAS = 6
LAYERS = 6
EVERY_LAYER = st.integers(0, LAYERS - 1)
EVERY_DELTA = st.integers(0, DELTAS - 1)


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Waits for the reactor: the model runs in a thread, and our code on the reactor."""
    outcome: list[T] = []

    async def run() -> None:
        outcome.append(await coroutine)

    call: Any = blockingCallFromThread  # its annotation accepts no Deferred
    call(REACTOR, lambda: ensureDeferred(run()))
    return outcome[0]


async def release(pinned: PinnedLayer) -> None:
    pinned.release()


async def serve(catalogue: Catalogue, served: Digest, now: int) -> None:
    await catalogue.counters.served(served, now)


def parts(number: int) -> dict[Digest, int]:
    config, layers = some_layers(number)
    return {Digest.of(content): len(content) for content in (config, *layers)}


def content(number: int) -> Digest:
    return a_manifest(*some_layers(number)).digest


def in_order(gone: Mapping[int, float], kept: Mapping[int, float]) -> None:
    """Within a kind, the least recently used goes first."""
    assert not gone or not kept or max(gone.values()) <= min(kept.values())


class QuotaModel(RuleBasedStateMachine):
    """Checks the promises of the quota."""

    threads: Threads

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="obdelta-quota-"))
        self.now = 1_700_000_000.0
        self.served: dict[int, int] = {}
        self.fetched: set[int] = set()
        self.layers: dict[int, float] = {}
        self.fresh: dict[int, float] = {}
        self.sizes: dict[int, int] = {}
        self.pins: list[tuple[int, PinnedLayer]] = []
        self.catalogue: Catalogue | None = None

    @initialize(quota=st.integers(0, 80_000))
    def begin(self, quota: int) -> None:
        self.quota = quota
        self._open()

    def _open(self) -> None:
        self.blobs = BlobStore(self.directory, self.threads)
        wait(self.blobs.sweep())
        self.catalogue = wait(Catalogue.open(self.directory / "catalogue.sqlite", REACTOR))
        assert wait(self.catalogue.sweep(self.blobs)) == ([], 0)
        self.cache = wait(LayerCache.open(self.directory, self.threads, lambda: self.now))
        kind = StoredDeltas(self.catalogue, self.blobs, GRACE, lambda: self.now)
        self.store_quota = Quota({"deltas": kind, "layers": self.cache}, self.quota)

    @property
    def open_catalogue(self) -> Catalogue:
        assert self.catalogue is not None
        return self.catalogue

    @rule(seconds=st.integers(0, 200))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(number=EVERY_DELTA)
    def a_delta_is_built(self, number: int) -> None:
        row = wait(publish(self.open_catalogue, self.blobs, number, int(self.now)))
        self.served.setdefault(number, int(self.now))
        assert row.key == a_key(number)

    @precondition(lambda self: self.served)
    @rule(index=st.integers(0, 100))
    def a_delta_is_served(self, index: int) -> None:
        number = sorted(self.served)[index % len(self.served)]
        wait(serve(self.open_catalogue, content(number), int(self.now)))
        self.served[number] = int(self.now)
        self.fetched.add(number)

    @rule(number=EVERY_LAYER, blocks=st.integers(1, 5))
    def a_layer_is_added(self, number: int, blocks: int) -> None:
        tmp = self.blobs.temporary()
        blocks = self.sizes.setdefault(number, blocks)
        tmp.write_bytes(b"x" * BLOCK * blocks)
        wait(self.cache.adopt(tmp, DiffID.of(b"%d" % number), BLOCK * blocks))
        self.layers[number] = self.now
        self.fresh[number] = self.now + FRESH_SECONDS

    @rule(number=EVERY_LAYER)
    def a_layer_is_pinned(self, number: int) -> None:
        pinned = wait(self.cache.pin(DiffID.of(b"%d" % number)))
        assert (pinned is not None) == (number in self.layers)
        if pinned is not None:
            self.pins.append((number, pinned))
            self.layers[number] = self.now
            self.fresh.pop(number, None)

    @precondition(lambda self: self.pins)
    @rule(index=st.integers(0, 100))
    def a_layer_is_released(self, index: int) -> None:
        _, pinned = self.pins.pop(index % len(self.pins))
        wait(release(pinned))

    @rule()
    def the_process_restarts(self) -> None:
        wait(self.open_catalogue.close())
        self.pins.clear()
        self.fresh.clear()
        self._open()

    @rule(wanted=st.integers(0, 20_000))
    def the_quota_is_enforced(self, wanted: int) -> None:
        deltas_that_may_go = {
            number: float(at) for number, at in self.served.items() if at < int(self.now) - GRACE
        }
        pinned = {number for number, _ in self.pins}
        layers_that_may_go = {
            number: at
            for number, at in self.layers.items()
            if number not in pinned and self.fresh.get(number, 0) <= self.now
        }
        before = self._usage()
        result = wait(self.store_quota.reclaim(wanted))
        rows = wait(self.open_catalogue.recent(1000))
        left = {number for number in self.served if any(row.key == a_key(number) for row in rows)}
        stayed = {number for number in self.layers if self._layer_file(number).exists()}
        gone_deltas = {number: self.served.pop(number) for number in set(self.served) - left}
        gone_layers = {number: self.layers.pop(number) for number in set(self.layers) - stayed}
        # No protected entry was evicted, and of the others the older ones first.
        assert gone_deltas.items() <= deltas_that_may_go.items()
        assert gone_layers.items() <= layers_that_may_go.items()
        in_order(
            gone_layers,
            {number: at for number, at in layers_that_may_go.items() if number in stayed},
        )
        kept_deltas = {number: at for number, at in deltas_that_may_go.items() if number in left}
        kept_layers = [at for number, at in layers_that_may_go.items() if number in stayed]
        for fetched in (False, True):
            in_order(
                {
                    number: at
                    for number, at in gone_deltas.items()
                    if (number in self.fetched) == fetched
                },
                {
                    number: at
                    for number, at in kept_deltas.items()
                    if (number in self.fetched) == fetched
                },
            )
        # Deltas that no device has fetched go first.
        assert not (gone_deltas.keys() & self.fetched and kept_deltas.keys() - self.fetched)
        assert not gone_deltas or not kept_layers or max(gone_deltas.values()) <= min(kept_layers)
        compared = [at for number, at in kept_deltas.items() if number not in self.fetched]
        if not deltas_that_may_go.keys() - self.fetched:
            compared = list(kept_deltas.values())
        assert not gone_layers or not compared or max(gone_layers.values()) <= min(compared)
        self.fetched -= gone_deltas.keys()
        gone, kept = [*gone_deltas, *gone_layers], [*kept_deltas, *kept_layers]
        # Enough was evicted, or nothing more could be, and no more than needed.
        after = self._usage()
        assert result.usage == after
        assert result.freed == sum(before.values()) - sum(after.values())
        assert result.over == max(0, sum(after.values()) + wanted - self.quota)
        assert not (result.over and kept)
        if sum(before.values()) + wanted <= self.quota:
            assert not gone

    def _layer_file(self, number: int) -> Path:
        return self.cache.root / f"{DiffID.of(b'%d' % number).hex}.tar"

    def _usage(self) -> dict[str, int]:
        needed: dict[Digest, int] = {}
        for number in self.served:
            needed.update(parts(number))
        return {
            "deltas": sum(needed.values()),
            "layers": sum(BLOCK * self.sizes[number] for number in self.layers),
        }

    @invariant()
    def the_books_are_right(self) -> None:
        if self.catalogue is None:
            return
        assert wait(self.store_quota.usage()) == self._usage()
        expected = {digest for number in self.served for digest in parts(number)}
        assert set(self.blobs.digests()) == expected
        for number in self.served:
            assert wait(self.catalogue.manifest("v2/target", content(number))) is not None
        assert all(pinned.path.exists() for _, pinned in self.pins)

    def teardown(self) -> None:
        if self.catalogue is not None:
            wait(self.catalogue.close())
        shutil.rmtree(self.directory)


@pytest_twisted.ensureDeferred
async def test_the_quota_behaves_as_its_model() -> None:
    await run_model(QuotaModel, max_examples=30)
