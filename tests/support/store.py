"""Parts of the store for tests: a pool of real threads, one whose order the test decides, and
synthetic deltas.
"""

from __future__ import annotations

import errno
import json
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.app.runtime import Runtime, Services
from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.observability import Metrics
from obdelta.oci import Descriptor, Digest, Form, Manifest, parse_manifest
from obdelta.settings import Settings
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.store.file_writer import FileWriter

P = ParamSpec("P")
T = TypeVar("T")

REACTOR = cast(IReactor, reactor)


def runtime(configured: Settings, threads: Threads) -> Runtime:
    """Returns the base of a process's wiring, with which its state can be opened."""
    return Runtime(
        settings=configured,
        reactor=REACTOR,
        threads=threads,
        metrics=Metrics(),
        services=Services(),
    )


@contextmanager
def real_threads() -> Iterator[Threads]:
    """Yields four real threads on the real reactor."""
    pool = ThreadPool(1, 4, "store test")
    pool.start()
    try:
        yield Threads(REACTOR, pool)
    finally:
        pool.stop()


@pytest.fixture
def threads() -> Iterator[Threads]:
    with real_threads() as pool:
        yield pool


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    """Yields a store in the test's directory."""
    with real_threads() as threads:
        yield BlobStore(tmp_path, threads)


async def run_model(model: type[RuleBasedStateMachine], *, max_examples: int) -> None:
    """Runs a stateful model in a thread, with real threads as its ``threads``, so that the reactor
    is free for its work.
    """
    with real_threads() as threads:
        running = type(model.__name__, (model,), {"threads": threads})
        await deferToThread(
            run_state_machine_as_test,
            running,
            settings=settings(max_examples=max_examples, stateful_step_count=25, deadline=None),
        )


class QueuedThreads(Threads):
    """Threads whose calls wait until the test runs them, in any order, so that all interleavings
    can be tested.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.turns: deque[Callable[[], object]] = deque()

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Queues it for :meth:`run_call`."""
        done: Deferred[T] = Deferred()

        def call() -> None:
            try:
                outcome = function(*args, **kwargs)
            except Exception as error:
                # Another process may have this number by now; that is never chance, but always
                # our error.
                assert not (isinstance(error, OSError) and error.errno == errno.EBADF)
                done.errback(Failure())
            else:
                done.callback(outcome)

        self.calls.append(call)
        return done

    def soon(self, function: Callable[[], object]) -> None:
        """Queues it for :meth:`run_turn`."""
        self.turns.append(function)

    def run_call(self, index: int) -> None:
        """Runs one queued call completely and reports its result."""
        self.calls.pop(index % len(self.calls))()

    def run_turn(self) -> None:
        """Runs the reactor's next turn."""
        for _ in range(len(self.turns)):
            self.turns.popleft()()

    def drain(self, order: random.Random) -> None:
        """Runs everything until nothing is left to do."""
        while self.calls or self.turns:
            if self.calls:
                self.run_call(order.randrange(len(self.calls)))
            self.run_turn()


@asynccontextmanager
async def opened(directory: Path, steps: list[str] | None = None) -> AsyncIterator[Catalogue]:
    """Opens the catalogue of a directory, with the given steps of its schema or all of them."""
    catalogue = await Catalogue.open(directory / "catalogue.sqlite", REACTOR, steps=steps)
    try:
        yield catalogue
    finally:
        await catalogue.close()


def a_key(number: int, kind: Kind = "v3", recipe: int = 1, form: Form = Form.GZIP) -> DeltaKey:
    """Returns the key of the number-th pair."""
    base, target = Digest.of(b"base %d" % number), Digest.of(b"target %d" % number)
    return DeltaKey(kind, recipe, base, target, form)


def a_manifest(config: bytes, layers: list[bytes], form: Form = Form.GZIP) -> Manifest:
    """Returns a manifest over these contents."""

    def descriptor(media_type: str, content: bytes) -> dict[str, Any]:
        return Descriptor(media_type, Digest.of(content), len(content)).as_json()

    value = {
        "schemaVersion": 2,
        "mediaType": form.traits.manifest_type,
        "config": descriptor(form.traits.config_type, config),
        "layers": [descriptor(form.traits.layer_type, layer) for layer in layers],
    }
    manifest = parse_manifest(json.dumps(value).encode("ascii"), form.traits.manifest_type)
    assert isinstance(manifest, Manifest)
    return manifest


def a_row(key: DeltaKey, content: Digest, created: int, size: int = 0) -> DeltaRow:
    """Returns a row for a delta of that pair."""
    tag = None if key.kind == "v2" else f"delta-{Digest.of(repr(key).encode()).hex[:16]}"
    return DeltaRow(
        key,
        "v2/base",
        "v2/target",
        tag,
        content,
        1000,
        size,
        1.5,
        created,
        details={"layers": [1, 2]},
    )


def some_layers(number: int, count: int = 3, size: int = 5000) -> tuple[bytes, list[bytes]]:
    """Returns config and layers of the number-th delta; the last layer is the same for all."""
    source = random.Random(number)
    return b'{"number": %d}' % number, [source.randbytes(size) for _ in range(count - 1)] + [
        b"shared" * 100
    ]


async def publish(catalogue: Any, blobs: BlobStore, number: int, created: int) -> DeltaRow:
    """Stores the number-th v3 delta in the store and the catalogue."""
    config, layers = some_layers(number)
    for content in (config, *layers):
        await blobs.put(content)
    manifest = a_manifest(config, layers)
    row = a_row(a_key(number), manifest.digest, created, sum(map(len, layers)) + len(config))
    published: DeltaRow = await catalogue.publish_v3(row, manifest, blobs)
    return published


def blob_writer(
    blobs: BlobStore, *, length: int | None = None, unverified_tail: int = 0
) -> FileWriter:
    """Returns a writer whose file becomes a blob."""
    return FileWriter(
        blobs.temporary(".spool"),
        blobs.threads,
        blobs.place,
        length=length,
        unverified_tail=unverified_tail,
    )
