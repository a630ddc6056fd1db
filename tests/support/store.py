"""Parts of the store for tests: a pool of real threads, one whose order the test decides, and
made-up deltas.
"""

from __future__ import annotations

import errno
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.concurrency.threads import Threads
from obdelta.oci import Descriptor, Digest, Manifest, parse_manifest
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind

P = ParamSpec("P")
T = TypeVar("T")

REACTOR = cast(IReactorFromThreads, reactor)


@contextmanager
def real_threads() -> Iterator[Threads]:
    """Four real threads on the real reactor."""
    pool = ThreadPool(1, 4, "store test")
    pool.start()
    try:
        yield Threads(REACTOR, pool)
    finally:
        pool.stop()


async def run_model(model: type[RuleBasedStateMachine], *, max_examples: int) -> None:
    """Runs a stateful model in a thread, with real threads as its ``threads``: the reactor is free
    for what it waits for.
    """
    with real_threads() as threads:
        running = type(model.__name__, (model,), {"threads": threads})
        await deferToThread(
            run_state_machine_as_test,
            running,
            settings=settings(max_examples=max_examples, stateful_step_count=25, deadline=None),
        )


class QueuedThreads(Threads):
    """Calls wait until the test lets one of them run, in any order: all interleavings, none by
    chance.
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
                # The number may be somebody else's by now: never by bad luck, always an error of
                # ours.
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
        """One queued call runs, from its start to its end, and is told of."""
        self.calls.pop(index % len(self.calls))()

    def run_turn(self) -> None:
        """The reactor's next turn."""
        for _ in range(len(self.turns)):
            self.turns.popleft()()

    def drain(self, order: random.Random) -> None:
        """Until nothing is left to do."""
        while self.calls or self.turns:
            if self.calls:
                self.run_call(order.randrange(len(self.calls)))
            self.run_turn()


def a_key(number: int, kind: Kind = "v3", recipe: int = 1) -> DeltaKey:
    """The number-th pair."""
    return DeltaKey(kind, recipe, Digest.of(b"base %d" % number), Digest.of(b"target %d" % number))


def a_manifest(config: bytes, layers: list[bytes]) -> Manifest:
    """A manifest over these contents."""

    def descriptor(media_type: str, content: bytes) -> dict[str, Any]:
        return Descriptor(media_type, Digest.of(content), len(content)).as_json()

    value = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": descriptor(DOCKER_CONFIG, config),
        "layers": [descriptor(DOCKER_LAYER, layer) for layer in layers],
    }
    manifest = parse_manifest(json.dumps(value).encode("ascii"), DOCKER_MANIFEST)
    assert isinstance(manifest, Manifest)
    return manifest


def a_row(key: DeltaKey, content: Digest, created: int, size: int = 0) -> DeltaRow:
    """A delta of that pair."""
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
    """Config and layers of the number-th delta; the last layer is the same for all."""
    source = random.Random(number)
    return b'{"number": %d}' % number, [source.randbytes(size) for _ in range(count - 1)] + [
        b"shared" * 100
    ]


async def publish(catalogue: Any, blobs: BlobStore, number: int, created: int) -> DeltaRow:
    """Puts the number-th v3 delta into the store and the catalogue."""
    config, layers = some_layers(number)
    for content in (config, *layers):
        await blobs.put(content)
    manifest = a_manifest(config, layers)
    row = a_row(a_key(number), manifest.digest, created, sum(map(len, layers)) + len(config))
    published: DeltaRow = await catalogue.publish_v3(row, manifest, blobs)
    return published
