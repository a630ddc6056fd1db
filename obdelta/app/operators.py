"""Wiring of the operators' endpoint. Each part adds its routes here."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger

from obdelta.app.access import Ingress, preparing_credentials
from obdelta.app.components import Components
from obdelta.app.devices import DeviceParts, ServerParts
from obdelta.app.fleet import make_fleet
from obdelta.app.runtime import Runtime
from obdelta.builds.delta_actions import FAILURE_SECONDS, DeltaActions
from obdelta.builds.inputs.related_images import related_images
from obdelta.builds.prebuild import PrebuildLists
from obdelta.concurrency.watched_file import FileProblem
from obdelta.errors import Unavailable
from obdelta.fleet.watcher import ReleaseWatcher
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.listen import listen
from obdelta.oci import Form, Reference
from obdelta.registry import Credentials
from obdelta.web.devices.access.admission import TokenAccess
from obdelta.web.devices.access.signed_urls import load_key
from obdelta.web.operators.actions_api import ActionsApi
from obdelta.web.operators.app import Description, OperatorApp
from obdelta.web.operators.deltas_api import DeltasApi
from obdelta.web.operators.fleet_api import FleetApi
from obdelta.web.operators.health import MetricsPage
from obdelta.web.operators.login import ActionGuard, ProxyLogin
from obdelta.web.operators.maintenance_api import GcApi, PruneApi
from obdelta.web.operators.pages.delta_pages import DeltaPages, forms_of
from obdelta.web.operators.pages.live_pages import (
    FAILURES,
    RECENT,
    WATCH_SECONDS,
    StatusPages,
)
from obdelta.web.operators.pages.plot import DAY, DAYS_PLOTTED, HOURS_PLOTTED
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.operators.passwords import PasswordFile
from obdelta.web.operators.prepare_api import PrepareApi
from obdelta.web.operators.status_api import BuildsApi, StatusApi
from obdelta.web.operators.trace_api import TraceApi
from obdelta.web.request import make_site, measure_connections, measured

log = Logger()

KEY_FILE = "operator-key"
"""The key in ``state-dir`` with which commands of this machine act."""
PREPARED_AT_ONCE = 64
"""Deltas that are prepared at a time if workers build. Their queue bounds the builds."""
PINNABLE = 2
"""Pinned deltas may take the quota divided by this number."""
RELATED_CANDIDATES = 64
"""Number of devices' images among which the server looks for bases of a new image."""


async def make_operator_app(server: ServerParts) -> OperatorApp:
    """Returns the operators' application with all its routes. Raises SettingsError."""
    parts, service = server.parts, server.service
    configured, reactor, catalogue = parts.settings, parts.reactor, parts.state.catalogue
    guard = await make_guard(parts)
    app = OperatorApp(guard, configured.operator_hosts or ())
    Description().add_to(app.routes)
    parts.readiness.add("store", parts.state.quota_service.problem)
    parts.readiness.add_to(app.routes)
    BuildsApi(service, catalogue.named_images, reactor).add_to(app.routes)
    measure_store(parts)
    measure_fleets(parts)
    measure_readiness(parts)
    measure_certificates(server.devices)
    MetricsPage(parts.metrics).add_to(app.routes)
    credentials = preparing_credentials(configured)
    DeltasApi(catalogue, parts.state.blobs, parts.lookup, credentials, time.time).add_to(app.routes)
    pinnable = configured.store_quota // PINNABLE
    actions = DeltaActions(service, catalogue, parts.state.blobs, pinnable)
    ActionsApi(actions, credentials, catalogue.named_images).add_to(app.routes)
    DeltaPages(actions, guard, catalogue, credentials).add_to(app.routes)
    at_once = configured.max_builds if configured.builds == "here" else PREPARED_AT_ONCE
    lists = PrebuildLists(service, reactor, at_once, configured.public_host)
    parts.services.add_stop(lists.close)
    fleet = make_fleet(parts, lists)
    watcher = None if fleet is None else fleet.watcher
    gather = status_gatherer(server, watcher, guard)
    watch = problem_watch(server, watcher, guard)
    pages = StatusPages(service, catalogue, gather, watch, reactor, forms=forms_of(guard))
    pages.add_to(app.routes)
    StatusApi(service, gather).add_to(app.routes)
    GcApi(parts.state.quota_service, configured.store_quota).add_to(app.routes)
    make_prepare_api(parts, lists).add_to(app.routes)
    FleetApi(watcher).add_to(app.routes)
    PruneApi(None if fleet is None else fleet.pruner).add_to(app.routes)
    TraceApi(server.devices.traces).add_to(app.routes)
    return app


async def make_guard(parts: Components) -> ActionGuard:
    """Returns the check of operators' logins. Raises SettingsError."""
    configured, threads = parts.settings, parts.threads
    key = await threads.run(load_key, configured.state_dir / KEY_FILE)
    passwords, proxy = None, None
    if configured.operator_passwords is not None:
        passwords = PasswordFile(configured.operator_passwords, parts.reactor.seconds)
    if (given := configured.operator_proxy) is not None:
        proxy = ProxyLogin(given.header, TrustedProxies(given.networks), given.unix)
    return ActionGuard(key, threads, parts.reactor, passwords, proxy)


def make_prepare_api(parts: Components, lists: PrebuildLists) -> PrepareApi:
    """Returns the API that builds deltas before devices request them."""
    configured, history = parts.settings, parts.state.catalogue.requested_updates

    async def related_bases(
        target: Reference, credentials: Credentials, count: int
    ) -> list[Reference]:
        running = await history.running(RELATED_CANDIDATES)
        others = [image for image in running if image.repository != target.repository]
        return await related_images(parts.lookup, target, others, credentials, count)

    return PrepareApi(
        lists,
        history,
        related_bases,
        preparing_credentials(configured),
        configured.image_hosts,
        parts.reactor,
    )


def status_gatherer(
    server: ServerParts, watcher: ReleaseWatcher | None, guard: ActionGuard
) -> Callable[[], Awaitable[StatusData]]:
    """Returns a function that gathers the data of the status page."""
    parts, certificates = server.parts, server.devices.ingress.certificates
    catalogue, readiness = parts.state.catalogue, parts.readiness

    async def gather() -> StatusData:
        now = time.time()
        totals = await catalogue.totals()
        recent = await catalogue.recent(RECENT)
        failures = (await catalogue.failures.all(int(now), FAILURE_SECONDS))[:FAILURES]
        shown = [digest for row in recent for digest in (row.key.base, row.key.target)]
        shown += [digest for row in failures for digest in (row.base, row.target)]
        return StatusData(
            now=now,
            clock=parts.reactor.seconds(),
            devices=parts.metrics.connected_devices(),
            totals=totals,
            counters=await catalogue.counters.all(),
            served=await catalogue.counters.served_since(int(now) - HOURS_PLOTTED, 1),
            served_daily=await catalogue.counters.served_since(int(now) - DAYS_PLOTTED, DAY),
            recent=recent,
            failures=failures,
            names=await catalogue.named_images.of(shown),
            store=await parts.state.quota_service.usage(),
            quota=parts.settings.store_quota,
            fleets=await parts.estimates.fleets(),
            problems=await readiness.problems(),
            ages=readiness.ages(),
            warnings=readiness.current_warnings(),
            notes=readiness.current_notes(),
            certificates={} if certificates is None else certificates.expiries(),
            unusable_files=unusable_files(server.devices.ingress, guard),
            refused=server.devices.traces.refused_clients(),
            fleet_problem=None if watcher is None else watcher.problem,
            fleet_problem_since=0.0 if watcher is None else watcher.problem_since,
        )

    return gather


def problem_watch(
    server: ServerParts, watcher: ReleaseWatcher | None, guard: ActionGuard
) -> Callable[[], Awaitable[object]]:
    """Returns a function that returns what is wrong now, fresh enough for open pages."""
    readiness = server.parts.readiness
    certificates = server.devices.ingress.certificates

    async def watch() -> object:
        return (
            await readiness.problems(WATCH_SECONDS / 2),
            [*readiness.current_warnings()],
            unusable_files(server.devices.ingress, guard),
            None if certificates is None else certificates.expiries(),
            None if watcher is None else watcher.problem,
        )

    return watch


def unusable_files(ingress: Ingress, guard: ActionGuard) -> list[FileProblem]:
    """Returns the files that have changed since the start and cannot be used: certificates, the key
    of tokens, and operators' passwords. Reads those that have just changed.
    """
    certificates, access = ingress.certificates, ingress.access
    key = access.key_problem() if isinstance(access, TokenAccess) else None
    return [
        *([] if certificates is None else certificates.problems()),
        *(problem for problem in (key, guard.file_problem()) if problem is not None),
    ]


def measure_store(parts: Components) -> None:
    """Registers the store's gauges, which are updated when metrics are read."""
    configured, state, metrics = parts.settings, parts.state, parts.metrics
    for kind in ("all", "deltas", "layers", "trees", "upstream"):
        metrics.store_quota.labels(kind).set(configured.store_quota)

    async def refresh() -> None:
        try:
            totals = await state.catalogue.totals()
            metrics.set_counters(await state.catalogue.counters.all())
        except Unavailable as error:
            log.warn("the catalogue's metrics were not updated: {reason}", reason=str(error))
            return
        metrics.store_deltas.set(totals.deltas)
        for kind, used in (await state.quota_service.usage()).items():
            metrics.store_bytes.labels(kind).set(used)

    metrics.before_reading(refresh)


def measure_fleets(parts: Components) -> None:
    """Registers the gauges of devices' links and processors, which are updated when metrics are
    read.
    """

    async def refresh() -> None:
        try:
            fleets = await parts.estimates.fleets()
        except Unavailable as error:
            log.warn("the metrics of devices were not updated: {reason}", reason=str(error))
            return
        for engine in Form:
            known = [fleet.estimate for fleet in fleets if fleet.engine is engine]
            parts.metrics.devices_estimated(
                engine.value, [(one.devices, one.link, one.command) for one in known]
            )

    parts.metrics.before_reading(refresh)


def measure_readiness(parts: Components) -> None:
    """Registers the gauges of the readiness checks, which are made when metrics are read."""

    async def refresh() -> None:
        parts.metrics.checks_ended(await parts.readiness.problems())

    parts.metrics.before_reading(refresh)


def measure_certificates(devices: DeviceParts) -> None:
    """Registers the gauge of the certificates' expiry, which is updated when metrics are read."""
    used, metrics = devices.ingress.certificates, devices.runtime.metrics
    if used is None:
        return

    async def refresh() -> None:
        for file, seconds in used.expiries().items():
            metrics.certificate_expiry.labels(file).set(seconds)

    metrics.before_reading(refresh)


async def listen_for_operators(runtime: Runtime, app: OperatorApp) -> list[IListeningPort]:
    """Returns the open ports of operators. The caller stops them."""
    configured, reactor = runtime.settings, runtime.reactor
    site = make_site(
        app,
        reactor,
        clients=ForwardedClients(None),
        ended=measured(runtime.metrics, "operators"),
    )
    measure_connections(runtime.metrics, "operators", site)
    return await listen(configured.operator_listen, site, reactor, setting="operator-listen")
