"""Wiring of replicas that share work (setting ``shared``): Redis, and build turns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from obdelta.app.state import Closers, State
from obdelta.builds.registry_publisher import RegistryPublisher
from obdelta.builds.replicas.leases import Leases
from obdelta.builds.replicas.redis_connection import Connection, connect
from obdelta.builds.replicas.turns import SharedTurns
from obdelta.concurrency.threads import Threads
from obdelta.errors import SettingsError
from obdelta.settings import Settings
from obdelta.web.operators.health import Readiness

log = Logger()

_THREADS = 2
"""Redis calls are short. The second thread is for when the first waits for a time-out."""


@dataclass(frozen=True, slots=True)
class Shared:
    """State that replicas share."""

    connection: Connection
    leases: Leases


def make_shared(
    configured: Settings, reactor: Any, readiness: Readiness, closers: Closers
) -> Shared | None:
    """Returns the shared state, None for a single server. Redis may be down:
    readiness reports it.
    """
    url = configured.shared
    if url is None:
        return None
    if configured.publish_host is None:
        raise SettingsError(
            "upstream", None, "a registry, with shared: replicas find each other's deltas in it"
        )
    client = connect(
        url.host,
        url.port,
        url.database,
        url.username,
        url.password,
        tls=url.tls,
        ca=configured.shared_ca,
    )
    pool = ThreadPool(0, _THREADS, "redis")
    pool.start()
    where = f"{url.host}:{url.port}"
    connection = Connection(client, where, Threads(reactor, pool), reactor)
    leases = Leases(
        connection, prefix_of(configured.publish_host), configured.shared_lease, reactor
    )

    async def close() -> None:
        await leases.close()
        await connection.close()
        pool.stop()

    closers.append(close)
    readiness.notes.append(
        lambda: (
            f"shared: Redis at {where} "
            + (
                "answers"
                if connection.problem is None
                else f"is away, this replica goes on by itself: {connection.problem}"
            )
        )
    )
    connection.watch()
    return Shared(connection, leases)


def prefix_of(registry: str) -> str:
    """Returns the prefix of all Redis keys. Only replicas of the same registry share them."""
    return f"obdelta:{hashlib.sha256(registry.encode('utf-8')).hexdigest()[:16]}:"


def make_replicas(
    configured: Settings,
    reactor: Any,
    state: State,
    shared: Shared | None,
    publisher: RegistryPublisher | None,
    closers: Closers,
) -> SharedTurns | None:
    """Returns the build turns of replicas, None for a single server."""
    if shared is None or publisher is None:
        return None

    turns = SharedTurns(
        shared.leases,
        publisher,
        reactor,
        state.catalogue.count,
        failure_memory=configured.failure_memory,
        push_seconds=configured.build_timeout,
    )
    closers.append(turns.close)
    return turns
