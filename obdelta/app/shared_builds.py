"""Wiring of builds that several servers share: publishers to the registry, turns of replicas, and
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from twisted.python.threadpool import ThreadPool

from obdelta.app.access import push_target
from obdelta.app.components import Components
from obdelta.app.runtime import Runtime
from obdelta.builds.engine.builder import ENGINE_RECIPE
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.builds.publish.delta_tags import delta_tag, registry_tag
from obdelta.builds.publish.registry_publisher import RegistryPublisher
from obdelta.builds.publish.registry_pushes import PushParts
from obdelta.builds.replicas.leases import LEASE_SECONDS, Leases, prefix_of
from obdelta.builds.replicas.redis_connection import Connection, connect
from obdelta.builds.replicas.turns import SharedTurns
from obdelta.builds.rsync_v2 import V2_RECIPE
from obdelta.builds.types import Pair, Published, Ready
from obdelta.builds.verdicts import FAILURE_MEMORY
from obdelta.concurrency.tasks import Threads
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.registry.client import RegistryClient
from obdelta.store.catalogue.records import Kind

if TYPE_CHECKING:
    import redis

    from obdelta.builds.workers.dispatcher import Dispatcher
    from obdelta.builds.workers.job_queue import JobQueue

_REDIS_THREADS = 2
"""Redis calls are short. The second thread is for when the first waits for a time-out."""


@dataclass(frozen=True, slots=True)
class Publishers:
    """The publishers of finished deltas to the registry; None if this server alone serves."""

    images: RegistryPublisher | None = None
    batches: BatchPublisher | None = None

    @property
    def by_kind(self) -> Mapping[Kind, RegistryPublisher | BatchPublisher]:
        """The publisher of each kind of delta that is pushed."""
        found: dict[Kind, RegistryPublisher | BatchPublisher] = {}
        if self.images is not None:
            found["v3"] = self.images
        if self.batches is not None:
            found["v2"] = self.batches
        return found


def make_publishers(parts: Components) -> Publishers:
    """Returns the publishers of finished deltas to the registry. Raises SettingsError."""
    configured, target = parts.settings, push_target(parts.settings)
    if target is None:
        return Publishers()
    host, credentials = target
    upstream = cast(RegistryClient, parts.upstream)  # there is no target in layouts
    # Replicas that serve deltas themselves find those of the others in the registry, under the name
    # that devices were given.
    serve = configured.publish == "serve"
    pushes = PushParts(
        upstream=upstream,
        pusher=upstream.pusher(),
        credentials=credentials,
        blobs=parts.state.blobs,
        catalogue=parts.state.catalogue,
        clock=parts.reactor,
    )
    images = RegistryPublisher(
        pushes,
        host=configured.public_host if serve else host,
        tag=(lambda pair: delta_tag(pair.key)) if serve else registry_tag,
        others=configured.shared is not None,
    )
    batches = BatchPublisher(pushes, host=host)
    for publisher in (images, batches):
        parts.services.add_stop(publisher.close)
    return Publishers(images, batches)


def make_replicas(parts: Components, publishers: Publishers) -> SharedTurns | None:
    """Returns the build turns of replicas, None for a single server. Redis may be down: readiness
    reports it.
    """
    configured, reactor = parts.settings, parts.reactor
    url = configured.shared
    if url is None or configured.publish_host is None:
        return None
    client = make_client(parts)
    pool = ThreadPool(0, _REDIS_THREADS, "redis")
    pool.start()
    where = f"{url.host}:{url.port}"
    connection = Connection(client, where, Threads(reactor, pool), reactor)
    leases = Leases(connection, prefix_of(configured.publish_host), LEASE_SECONDS, reactor)
    turns = SharedTurns(
        leases,
        publishers.by_kind,
        reactor,
        parts.state.catalogue.counters.count,
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


def make_client(runtime: Runtime) -> redis.Redis:
    """Returns a client of Redis that has not connected yet. Raises SettingsError without a URL."""
    url = runtime.settings.shared
    if url is None:
        raise SettingsError("shared", None, "the URL of a Redis server, which workers need")
    return connect(
        url.host,
        url.port,
        url.database,
        url.username,
        url.password,
        tls=url.tls,
        ca=runtime.settings.shared_ca,
    )


def make_jobs(runtime: Runtime) -> Callable[[redis.Redis], JobQueue]:
    """Returns a function that makes the job queue for a client of Redis. Raises SettingsError if
    workers cannot be used.
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
            "builds",
            configured.builds,
            "here, where RQ is missing: in obdelta's checkout: pip install '.[workers]'",
        ) from error
    native = configured.builder[0] == "native"
    recipes: dict[Kind, int] = {"v2": V2_RECIPE, "v3": RECIPE if native else ENGINE_RECIPE}
    version, prefix = version_of(recipes, configured.publish), prefix_of(host)
    return lambda client: JobQueue(client, prefix, host, version)


def make_dispatcher(parts: Components, publishers: Publishers) -> Dispatcher | None:
    """Returns the dispatcher that hands builds over to workers (``obdelta worker``), None if this
    server builds. Raises SettingsError.
    """
    if parts.settings.builds == "here":
        return None
    jobs_of = make_jobs(parts)
    from obdelta.builds.workers.dispatcher import Dispatcher

    client = make_client(parts)
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
