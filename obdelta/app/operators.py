"""Wiring of the operators' endpoint. Each part adds its routes here."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger

from obdelta.app.factories import own_credentials
from obdelta.app.state import Closers, State
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.prebuild import Preparing
from obdelta.builds.related_images import relatives
from obdelta.builds.service import DeltaService
from obdelta.errors import Unavailable
from obdelta.net.client_address import ForwardedClients
from obdelta.net.listen import listen
from obdelta.observability import Metrics
from obdelta.oci import Reference
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import CredentialPolicy, Credentials, Upstream
from obdelta.settings import Settings
from obdelta.web.devices.app import make_site
from obdelta.web.operators.app import BuildsApi, OperatorApp
from obdelta.web.operators.deltas_api import FinishedDeltas
from obdelta.web.operators.gc_api import Collecting
from obdelta.web.operators.health import (
    WORKERS_GOOD_FOR,
    Readiness,
    upstream_problem,
    workers_problem,
)
from obdelta.web.operators.openapi import Description
from obdelta.web.operators.pages.live_pages import FAILURE_SECONDS, FAILURES, RECENT, StatusPages
from obdelta.web.operators.pages.plot import PLOTTED_SECONDS
from obdelta.web.operators.pages.status_page import Known
from obdelta.web.operators.prepare_api import PrepareApi
from obdelta.web.operators.status_api import StatusApi
from obdelta.web.request_metrics import MetricsPage, measure_connections, measured

log = Logger()

CANDIDATES = 64
"""Images of devices that are searched for those that a new image replaces."""


def make_operator_face(
    configured: Settings,
    reactor: Any,
    *,
    state: State,
    upstream: Upstream,
    coordinator: DeltaService,
    metrics: Metrics,
    readiness: Readiness,
    policy: CredentialPolicy,
    closers: Closers,
) -> OperatorApp:
    """Returns the operators' application with all its routes."""
    face = OperatorApp(configured.operator_hosts or ())
    Description().add_to(face.routes)
    readiness.add("store", state.upkeep.problem)
    readiness.add_to(face.routes)
    BuildsApi(coordinator, reactor).add_to(face.routes)
    measure_store(configured, state, metrics)
    MetricsPage(metrics).add_to(face.routes)
    FinishedDeltas(state.catalogue, state.blobs, time.time).add_to(face.routes)
    know = knowing(configured, reactor, state, metrics, readiness)
    StatusPages(coordinator, state.catalogue, know, reactor).add_to(face.routes)
    StatusApi(coordinator, know).add_to(face.routes)
    Collecting(state.upkeep, configured.store_quota).add_to(face.routes)
    preparing = Preparing(coordinator, reactor, configured.max_builds, configured.public_host)
    closers.append(preparing.close)
    hosts = configured.registry_hosts | {configured.public_host}
    credentials = preparing_credentials(configured, policy)
    lookup, asked = ImageLookup(upstream, reactor), state.catalogue.asked

    async def related(target: Reference, given: Credentials, count: int) -> list[Reference]:
        others = [
            one for one in await asked.running(CANDIDATES) if one.repository != target.repository
        ]
        return await relatives(lookup, target, others, given, count)

    PrepareApi(preparing, asked, related, credentials, hosts, reactor).add_to(face.routes)
    return face


def preparing_credentials(
    configured: Settings, policy: CredentialPolicy
) -> Callable[[bytes | None], Credentials]:
    """Returns a function that chooses the upstream credentials for deltas that operators prepare.

    Those of the operator's request come first, then the server's own. The latter may be the
    builder's token, also where devices bring their own credentials.
    """
    own = own_credentials(configured) or policy.credentials(None)
    return lambda header: own if header is None else Credentials.from_header(header)


def knowing(
    configured: Settings, reactor: Any, state: State, metrics: Metrics, readiness: Readiness
) -> Callable[[], Awaitable[Known]]:
    """Returns a function that gathers the data of the status page."""

    async def know() -> Known:
        now, catalogue = time.time(), state.catalogue
        totals = await catalogue.totals()
        return Known(
            now=now,
            clock=reactor.seconds(),
            devices=metrics.connected_devices(),
            totals=totals,
            counters=await catalogue.counters(),
            served=await catalogue.served_since(int(now) - PLOTTED_SECONDS, 1),
            recent=await catalogue.recent(RECENT),
            failures=(await catalogue.failures(int(now), FAILURE_SECONDS))[:FAILURES],
            store=await state.upkeep.usage(),
            quota=configured.store_quota,
            problems=await readiness.problems(),
            notes=readiness.told_notes(),
        )

    return know


def make_readiness(reactor: Any, upstream: Upstream, pool: WorkerPool) -> Readiness:
    """Returns the readiness checks. Other parts may add checks at any time."""
    readiness = Readiness(reactor)
    readiness.add("upstream", upstream_problem(upstream))
    readiness.add("workers", workers_problem(pool), good_for=WORKERS_GOOD_FOR)
    return readiness


def measure_store(configured: Settings, state: State, metrics: Metrics) -> None:
    """Registers the store's gauges, which are updated when metrics are read."""
    quota = configured.store_quota
    own = {
        "deltas": configured.delta_cache,
        "layers": configured.layer_cache,
        "trees": configured.tree_cache,
        "upstream": configured.blob_cache,
    }
    for kind, limit in {"all": quota, **own}.items():
        metrics.store_quota.labels(kind).set(quota if limit is None else limit)

    async def refresh() -> None:
        try:
            totals = await state.catalogue.totals()
            metrics.set_tallies(await state.catalogue.counters())
        except Unavailable as error:
            log.warn("metrics lack what the catalogue knows: {reason}", reason=str(error))
            return
        metrics.store_deltas.set(totals.deltas)
        for kind, used in (await state.upkeep.usage()).items():
            metrics.store_bytes.labels(kind).set(used)

    metrics.before_reading(refresh)


async def listen_for_operators(
    configured: Settings, reactor: Any, face: OperatorApp, metrics: Metrics
) -> list[IListeningPort]:
    """Returns the open ports of operators. The caller stops them."""
    site = make_site(
        face, reactor, clients=ForwardedClients(None), ended=measured(metrics, "operators")
    )
    measure_connections(metrics, "operators", site)
    return await listen(configured.operator_listen, site, reactor, setting="operator-listen")
