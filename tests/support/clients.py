"""Clients of an upstream for tests: they retry quickly and leave nothing open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.registry import RegistryClient
from obdelta.registry.http.tls import Trust, make_agent, read_bundle
from obdelta.registry.http.transport import Http
from obdelta.registry.requests import Backoff

reactor = cast(IReactor, installed)
T = TypeVar("T")

QUICK = Backoff(attempts=4, first=0.001, most=0.002, max_retry_after=0.05, time_limit=30.0)


@contextmanager
def running_threads() -> Iterator[Threads]:
    """Yields a pool of threads for the block."""
    pool = ThreadPool(1, 4, "test")
    pool.start()
    try:
        yield Threads(reactor, pool)
    finally:
        pool.stop()


@asynccontextmanager
async def client_of(
    url: str, *, idle: float = 20.0, ca: Path | None = None, backoff: Backoff = QUICK
) -> AsyncIterator[RegistryClient]:
    """Yields a client that fails after milliseconds."""
    agent, pool = make_agent(
        reactor, Trust("localhost", None if ca is None else read_bundle(ca)), connect=10.0
    )
    with running_threads() as threads:
        http = Http(agent, reactor, idle=idle, pool=pool)
        client = RegistryClient(url, http, reactor, threads, backoff=backoff, proxy_backoff=backoff)
        try:
            yield client
        finally:
            await client.close()


class Memory:
    """A writer that keeps all bytes in memory."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.writes = 0

    async def write(self, chunk: bytes) -> None:
        """Keeps the bytes."""
        self.writes += 1
        self.content += chunk


@implementer(IConsumer)
class Consumer:
    """An IConsumer that keeps its bytes, and its producer, so that the test can pause it."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.producer: IPushProducer | None = None
        self.registered = 0

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        assert streaming and self.producer is None and IPushProducer.providedBy(producer)
        self.producer = cast(Any, producer)
        self.registered += 1

    def unregisterProducer(self) -> None:
        self.producer = None

    def registered_now(self) -> bool:
        """Whether a producer is registered now."""
        return self.producer is not None

    def write(self, data: bytes) -> None:
        assert self.producer is not None
        self.content += data


def started(work: Awaitable[T]) -> tuple[list[T], list[BaseException], Deferred[None]]:
    """Returns lists of the results and errors of a call, which grow as they arrive."""
    results: list[T] = []
    errors: list[BaseException] = []

    async def run() -> None:
        try:
            results.append(await work)
        except Exception as error:
            errors.append(error)

    return results, errors, ensureDeferred(run())
