"""Replicas that share leases through a Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from twisted.internet.interfaces import IReactorTime
from twisted.python.threadpool import ThreadPool

from obdelta.builds.replicas.leases import Done, Lease, Leases
from obdelta.builds.replicas.redis_connection import Connection, connect
from obdelta.concurrency.tasks import Threads
from obdelta.settings.address_parsers import RedisUrl, redis_url
from tests.support.redis import RunningRedis, running_redis
from tests.support.web import reactor


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def connected(
    url: str, ca: Path | None = None, clock: IReactorTime = reactor
) -> AsyncIterator[Connection]:
    it: RedisUrl = redis_url(url)
    pool = ThreadPool(0, 2)
    pool.start()
    client = connect(it.host, it.port, it.database, it.username, it.password, tls=it.tls, ca=ca)
    connection = Connection(client, f"{it.host}:{it.port}", Threads(reactor, pool), clock)
    try:
        yield connection
    finally:
        await connection.close()
        pool.stop()


@asynccontextmanager
async def replica(
    redis: RunningRedis, seconds: float = 20.0, clock: IReactorTime = reactor, prefix: str = "t:"
) -> AsyncIterator[Leases]:
    """Yields one replica's leases; with a Clock that stands still the replica is dead, and renews
    nothing.
    """
    async with connected(redis.url) as connection:
        leases = Leases(connection, prefix, seconds, clock)
        yield leases
        await leases.close()


def is_lost(lease: Lease) -> bool:
    return lease.lost


async def taken(leases: Leases, name: str) -> Lease:
    found = await leases.take(name)
    assert isinstance(found, Lease)
    return found


async def finished(leases: Leases, name: str) -> Done:
    found = await leases.take(name)
    assert isinstance(found, Done)
    return found
