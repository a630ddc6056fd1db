"""Wiring of the devices' endpoint: its handlers, its limits and its ports."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

from twisted.internet.interfaces import IListeningPort

from obdelta.app.factories import own_credentials
from obdelta.app.state import State
from obdelta.builds.delta_tags import DeltaTags
from obdelta.builds.inputs.blob_fetcher import UpstreamBlobs
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.service import DeltaService
from obdelta.builds.types import Pair
from obdelta.concurrency.limits import Limit
from obdelta.net.certificates import Certificates
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.http_server import HttpBounds
from obdelta.net.listen import listen
from obdelta.observability import Metrics
from obdelta.registry import CredentialPolicy, Upstream
from obdelta.rsync.batch import delayed_out_of_sync, out_of_sync
from obdelta.settings import OciLayouts, Settings
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.named_deltas import NamedDelta
from obdelta.web.delayed_devices import DelayedDevices
from obdelta.web.devices.admission import Admission, PullGrace
from obdelta.web.devices.app import METHODS, DeviceApp, make_site
from obdelta.web.devices.auth import Access
from obdelta.web.devices.legacy_batches import LegacyBatches
from obdelta.web.devices.pull_through import PullThrough
from obdelta.web.devices.rebuilt_layers import RebuiltLayers
from obdelta.web.devices.registry_api import Distribution
from obdelta.web.devices.signed_urls import UrlSigner, load_key
from obdelta.web.devices.stored_content import StoredContent
from obdelta.web.devices.v2 import Batches, V2Policy
from obdelta.web.devices.v3 import DeltaApi
from obdelta.web.held_answers import MOST, HeldAnswers
from obdelta.web.operators.health import Readiness
from obdelta.web.overload import RefusedPairs
from obdelta.web.request_metrics import measure_connections, measured

DEVICES = HttpBounds(body=8 * 1024, methods=METHODS)
"""Limits of the devices' ports. No route takes a body, and Twisted would spend half a second on
each form of a megabyte before it is refused.
"""


@dataclass(frozen=True, slots=True)
class Clients:
    """How a request's client is found. With the PROXY protocol a connection belongs to one device;
    without it, a proxy's connection carries requests of many.
    """

    proxies: TrustedProxies
    forwarding: TrustedProxies | None
    forwarded: ForwardedClients


def make_clients(configured: Settings) -> Clients:
    """Returns the rules for client addresses. Raises SettingsError."""
    proxies = TrustedProxies(configured.proxy_from)
    forwarding = None if configured.proxy_protocol else proxies
    return Clients(proxies, forwarding, ForwardedClients(forwarding))


async def make_face(
    configured: Settings,
    reactor: Any,
    *,
    access: Access,
    clients: Clients,
    state: State,
    upstream: Upstream,
    upstream_blobs: UpstreamBlobs,
    policy: CredentialPolicy,
    coordinator: DeltaService,
    metrics: Metrics,
    readiness: Readiness,
) -> DeviceApp:
    """Returns the application of the devices' endpoint."""
    requests = Limit(configured.max_requests, "requests of one client")
    metrics.devices.set_function(lambda: requests.keys)
    unprivileged = Limit(configured.max_builder_requests, "requests of builders from one address")
    grace = make_pull_grace(configured, state.catalogue)
    admission = Admission(access, requests, clients.forwarded, grace, unprivileged)
    held = make_held_answers(configured, reactor)
    tags = DeltaTags(state.catalogue, ImageLookup(upstream, reactor), upstream)

    async def named(tag: str, pair: Pair) -> None:
        digests = pair.base.manifest.digest, pair.target.manifest.digest
        await state.catalogue.named.record(
            NamedDelta(pair.target.repository, tag, pair.base.repository, *digests), time.time()
        )

    api = DeltaApi(
        coordinator,
        admission,
        policy,
        registry_hosts=configured.registry_hosts,
        public_host=configured.public_host,
        own=own_credentials(configured),
        tags=tags,
        named=named,
        held=held,
        refused=RefusedPairs(reactor),
        noted=lambda base, target: state.catalogue.asked.note(base, target, time.time()),
    )
    finished = StoredContent(
        catalogue=state.catalogue, blobs=state.blobs, admission=admission, now=time.time
    )
    key = await state.threads.run(load_key, configured.state_dir / "url-key")
    delayed_devices = DelayedDevices(reactor.seconds)
    readiness.notes.append(delayed_devices.note)
    batches = Batches(
        api=api,
        coordinator=coordinator,
        finished=finished,
        signer=UrlSigner(key, time.time, configured.v2_url_lifetime),
        public_url=configured.public_url,
        policy=V2Policy(
            streaming=configured.v2_streaming != "never",
            filling=configured.v2_filling if configured.v2_streaming == "padded" else None,
            full_pull=configured.v2_full_pull,
        ),
        out_of_sync=out_of_sync(),
        delayed_out_of_sync=delayed_out_of_sync(),
        delayed_devices=delayed_devices,
        peer=LegacyBatches(configured.delta_rsync, admission, state.threads)
        if configured.delta_rsync
        else None,
    )
    distribution = Distribution(
        upstream=upstream,
        coordinator=coordinator,
        finished=finished,
        admission=admission,
        policy=policy,
        relay_ping=relays_ping(configured),
        pull_through=make_pull_through(configured, reactor, state, upstream, upstream_blobs),
        again=RebuiltLayers(coordinator, state.catalogue, finished, state.threads),
        tags=tags,
        named=named,
    )
    return DeviceApp(api, batches, distribution, held, admission.counted_client)


def make_held_answers(configured: Settings, reactor: Any) -> HeldAnswers:
    """Returns the holder of answers that mean "ask again". Each held answer is an open connection:
    half of the open files stay free for other work.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if files == resource.RLIM_INFINITY else min(MOST, files // 2)
    return HeldAnswers(reactor, configured.hold, most)


def make_pull_grace(configured: Settings, catalogue: Catalogue) -> PullGrace | None:
    """Returns the grace for expired tokens, None where an expired token fetches nothing."""
    if not configured.pull_grace:
        return None
    return PullGrace(catalogue.started_pulls, configured.pull_grace, time.time)


def relays_ping(configured: Settings) -> bool:
    """Returns whether the upstream answers ``/v2/``: it does where it decides on
    devices' tokens.
    """
    return configured.auth == "none" and configured.upstream_credentials == "device"


def make_pull_through(
    configured: Settings,
    reactor: Any,
    state: State,
    upstream: Upstream,
    upstream_blobs: UpstreamBlobs,
) -> PullThrough | None:
    """Returns the cache of upstream blobs, None for layouts, which are on a disk already. A blob of
    more than a quarter of the quota is not kept.
    """
    if isinstance(configured.upstream, OciLayouts):
        return None
    return PullThrough(
        upstream, upstream_blobs, state.catalogue, reactor, configured.store_quota // 4
    )


async def listen_for_devices(
    configured: Settings,
    reactor: Any,
    face: DeviceApp,
    clients: Clients,
    metrics: Metrics,
    certificates: Certificates | None,
) -> list[IListeningPort]:
    """Returns the open ports of devices. The caller stops them."""
    connections = Limit(configured.max_connections, "connections from one address")
    site = make_site(
        face,
        reactor,
        clients=clients.forwarded,
        connections=connections,
        exempt=clients.forwarding,
        ended=measured(metrics, "devices"),
        bounds=DEVICES,
    )
    measure_connections(metrics, "devices", site)
    return await listen(
        configured.listen,
        site,
        reactor,
        certificates=certificates,
        proxies=clients.proxies if configured.proxy_protocol else None,
    )
