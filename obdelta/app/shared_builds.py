"""Wiring of builds that several servers share through Redis: turns of replicas, and workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.python.threadpool import ThreadPool

from obdelta.app.components import Components
from obdelta.app.publishers import Publishers
from obdelta.app.runtime import Runtime
from obdelta.builds.engine.builder import ENGINE_RECIPE
from obdelta.builds.replicas.leases import LEASE_SECONDS, Leases, prefix_of
from obdelta.builds.replicas.redis_connection import Connection, connect
from obdelta.builds.replicas.turns import SharedTurns
from obdelta.builds.rsync_v2 import V2_RECIPE
from obdelta.builds.types import Pair, Published, Ready
from obdelta.builds.verdicts import FAILURE_MEMORY
from obdelta.concurrency.threads import Threads
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.settings import RedisUrl
from obdelta.store.catalogue.records import Kind

if TYPE_CHECKING:
    import redis

    from obdelta.builds.workers.dispatcher import Dispatcher
    from obdelta.builds.workers.job_queue import JobQueue

_REDIS_THREADS = 2
"""Redis calls are short. The second thread is for when the first waits for a time-out."""


def make_replicas(parts: Components, publishers: Publishers) -> SharedTurns | None:
    """Returns the build turns of replicas, None for a single server. Redis may be down: readiness
    reports it.
    """
    configured, reactor = parts.settings, parts.reactor
    url = configured.shared
    if url is None or configured.publish_host is None:
        return None
    client = make_client(parts, url)
    pool = ThreadPool(0, _REDIS_THREADS, "redis")
    pool.start()
    where = f"{url.host}:{url.port}"
    connection = Connection(client, where, Threads(reactor, pool), reactor)
    leases = Leases(connection, prefix_of(configured.publish_host), LEASE_SECONDS, reactor)
    turns = SharedTurns(
        leases,
        publishers.by_kind,
        reactor,
        parts.state.catalogue.count,
        failure_memory=FAILURE_MEMORY,
        push_seconds=configured.build_timeout,
    )

    async def close() -> None:
        await turns.close()
        await leases.close()
        await connection.close()
        pool.stop()

    def note() -> str:
        if connection.problem is None:
            return f"shared: Redis at {where} answers"
        return (
            f"shared: Redis at {where} is unavailable: {connection.problem}:"
            " this replica works alone"
        )

    parts.services.add_stop(close)
    parts.readiness.notes.append(note)
    parts.readiness.warnings.append(lambda: "" if connection.problem is None else note())
    connection.watch()
    return turns


def make_client(runtime: Runtime, url: RedisUrl) -> redis.Redis:
    """Returns a client of Redis that has not connected yet."""
    return connect(
        url.host,
        url.port,
        url.database,
        url.username,
        url.password,
        tls=url.tls,
        ca=runtime.settings.shared_ca,
    )


def make_jobs(runtime: Runtime) -> tuple[RedisUrl, Callable[[redis.Redis], JobQueue]]:
    """Returns the URL of Redis, and a function that makes the job queue for a client of Redis.
    Raises SettingsError if workers cannot be used.
    """
    configured = runtime.settings
    if configured.shared is None:
        raise SettingsError("shared", None, "the URL of a Redis server, which workers need")
    host = configured.publish_host
    if host is None:
        raise SettingsError("upstream", None, "a registry, to which workers push deltas")
    try:
        from obdelta.builds.workers.build_requests import version_of
        from obdelta.builds.workers.job_queue import JobQueue
    except ImportError as error:
        raise SettingsError(
            "builds", configured.builds, "here, where RQ is missing: pip install obdelta[workers]"
        ) from error
    native = configured.builder[0] == "native"
    recipes: dict[Kind, int] = {"v2": V2_RECIPE, "v3": RECIPE if native else ENGINE_RECIPE}
    version, prefix = version_of(recipes, configured.publish), prefix_of(host)
    return configured.shared, lambda client: JobQueue(client, prefix, host, version)


def make_dispatcher(parts: Components, publishers: Publishers) -> Dispatcher | None:
    """Returns the dispatcher that hands builds over to workers (``obdelta worker``), None if this
    server builds. Raises SettingsError.
    """
    if parts.settings.builds == "here":
        return None
    url, jobs_of = make_jobs(parts)
    from obdelta.builds.workers.dispatcher import Dispatcher

    client = make_client(parts, url)
    pool = ThreadPool(0, _REDIS_THREADS, "redis")
    pool.start()
    by_kind = publishers.by_kind

    async def find(pair: Pair) -> Published | Ready | None:
        return await by_kind[pair.kind].find(pair)

    dispatcher = Dispatcher(jobs_of(client), Threads(parts.reactor, pool), parts.reactor, find)

    async def close() -> None:
        await dispatcher.close()
        client.close()
        pool.stop()

    parts.services.add_stop(close)
    parts.readiness.notes.append(dispatcher.note)
    parts.readiness.warnings.append(dispatcher.warning)
    waiting = parts.metrics.jobs_waiting
    waiting.labels("devices").set_function(lambda: dispatcher.load.devices)
    waiting.labels("prepared").set_function(lambda: dispatcher.load.prepared)
    parts.metrics.worker_slots.set_function(lambda: dispatcher.load.slots)
    return dispatcher
