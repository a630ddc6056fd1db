"""A process that fills and empties a store until it is killed.

Run as a program, it serves requests on stdin, one a line: ``<state directory> <seed> <n>``. For
each it forks a child that works on the store. The child kills itself at the n-th file operation of
its work (n > 0), or the test kills it by the process ID on stdout (n = 0). Forking makes hundreds
of kills affordable.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import defer, task
from twisted.python.threadpool import ThreadPool

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.oci import DiffID, Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import Outcome
from tests.support.store import blob_writer

_OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.utime",
    "os.truncate",
    "os.scandir",
}


def kill_at(operation: int) -> None:
    """Makes this process kill itself just before its n-th file operation from now on."""
    left = operation

    def audit(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _OPERATIONS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


async def work(reactor: IReactor, state: Path, seed: int, started: Callable[[], None]) -> None:
    """Publishes, serves and removes deltas endlessly, as builds and the quota do, in an order from
    the seed.
    """
    # Imported here: the process that forks has no reactor and no threads.
    from tests.support.store import a_key, a_manifest, a_row, some_layers

    source = random.Random(seed)
    pool = ThreadPool(1, 4, "crash")
    pool.start()
    blobs = BlobStore(state, Threads(reactor, pool))
    await blobs.sweep()
    catalogue = await Catalogue.open(state / "catalogue.sqlite", reactor)
    retired, _ = await catalogue.sweep(blobs)
    if retired:
        raise AssertionError(f"published without its blobs: {retired}")
    cache = await LayerCache.open(state, blobs.threads)
    started()

    async def adopted(content: bytes) -> Digest:
        digest = Digest.of(content)
        if source.random() < 0.5:
            tmp = blobs.temporary()
            tmp.write_bytes(content)
            await blobs.adopt(tmp, digest, len(content))
            return digest
        writer = blob_writer(blobs, length=len(content))
        for start in range(0, len(content), 2000):
            await writer.write(content[start : start + 2000])
        return await writer.finish(digest)

    async def build() -> None:
        number = source.randrange(12)
        config, layers = some_layers(number)
        manifest = a_manifest(config, layers)
        pins = [blobs.pin(Digest.of(content)) for content in (config, *layers)]
        try:
            await blobs.put(config)
            for layer in layers:
                await adopted(layer)
            row = await catalogue.publish_v3(
                a_row(a_key(number), manifest.digest, number), manifest, blobs
            )
        finally:
            for pin in pins:
                pin.release()
        await catalogue.counters.served(row.content, 100 + number)

    async def batch() -> None:
        content = b"batch %d" % source.randrange(5) * 1000
        digest = Digest.of(content)
        with blobs.pin(digest):
            await adopted(content)
            await catalogue.publish_v2(
                a_row(a_key(len(content), "v2"), digest, 1, len(content)), blobs
            )

    async def remove() -> None:
        rows = list(reversed(await catalogue.recent(1000)))
        await catalogue.remove([row.key for row in rows[: source.randrange(4)]], blobs)

    async def layer() -> None:
        content = source.randbytes(20_000)
        tmp = blobs.temporary()
        tmp.write_bytes(content)
        diff_id = DiffID.of(content)
        await cache.adopt(tmp, diff_id, len(content))
        pinned = await cache.pin(diff_id)
        if pinned is not None:
            pinned.path.with_suffix(".idx").write_bytes(content[:5000])
            pinned.release()

    async def fail() -> None:
        number = source.randrange(12)
        key = a_key(number)
        await catalogue.failures.remember("v3", key.base, key.target, Outcome.ERROR, "died", 1, 10)
        await catalogue.failures.forget("v3", key.base, key.target)

    while True:
        steps = [source.choice((build, build, build, batch, remove, layer, fail)) for _ in range(4)]
        await defer.gatherResults([defer.ensureDeferred(step()) for step in steps])


def _child(state: Path, seed: int, operation: int, report: int) -> None:
    def started() -> None:
        if operation:
            kill_at(operation)
        os.write(report, f"{os.getpid()}\n".encode())

    task.react(lambda reactor: defer.ensureDeferred(work(reactor, state, seed, started)))


def main() -> None:
    """Serves until stdin ends. Answers each request with the child's process id, then with how it
    ended.
    """
    for line in sys.stdin:
        directory, seed, operation = line.split()
        child = os.fork()
        if not child:
            _child(Path(directory), int(seed), int(operation), 1)
        _, status = os.waitpid(child, 0)
        ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        os.write(1, f"ended {ended}\n".encode())


if __name__ == "__main__":
    main()
