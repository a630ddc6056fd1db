"""Clients of an upstream as tests need them: quick to retry, and leaving
nothing open behind them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

from twisted.internet import reactor as installed
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from obdelta.concurrency.threads import Threads
from obdelta.registry import RegistryClient
from obdelta.registry.http.retry import Backoff
from obdelta.registry.http.tls import Trust, make_agent, read_bundle
from obdelta.registry.http.transport import Http

reactor: Any = installed

QUICK = Backoff(attempts=4, first=0.001, most=0.002, honoured=0.05, patience=30.0)


@contextmanager
def running_threads() -> Iterator[Threads]:
    """A pool for the length of a block."""
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
    """A client that gives up after milliseconds."""
    agent, pool = make_agent(
        reactor, Trust("localhost", None if ca is None else read_bundle(ca)), connect=10.0
    )
    with running_threads() as threads:
        http = Http(agent, reactor, idle=idle, pool=pool)
        client = RegistryClient(url, http, reactor, threads, backoff=backoff, relay_backoff=backoff)
        try:
            yield client
        finally:
            await client.close()


class Memory:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.writes = 0

    async def write(self, chunk: bytes) -> None:
        """Keep it."""
        self.writes += 1
        self.content += chunk


@implementer(IConsumer)
class Consumer:
    """An IConsumer that keeps what it gets, and its producer for the test to pace."""

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
        """Whether a producer has come and not gone."""
        return self.producer is not None

    def write(self, data: bytes) -> None:
        assert self.producer is not None
        self.content += data
