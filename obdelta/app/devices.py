"""Wiring of the devices' endpoint: its handlers, its limits and its ports."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

from twisted.internet.interfaces import IListeningPort
from twisted.web.resource import IResource

from obdelta.app.access import Ingress, own_credentials, push_credentials
from obdelta.app.components import Components
from obdelta.app.runtime import Runtime
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.builds.service import DeltaService
from obdelta.concurrency.limits import Limit
from obdelta.net.http_limits import HttpBounds
from obdelta.net.http_server import BoundedSite
from obdelta.net.listen import listen
from obdelta.rsync.batch import delayed_out_of_sync, out_of_sync
from obdelta.settings import OciLayouts, Settings
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.web.devices.access.admission import Admission, PullGrace
from obdelta.web.devices.access.signed_urls import UrlSigner, derive_key, load_key
from obdelta.web.devices.app import METHODS, DeviceApp, device_route
from obdelta.web.devices.blob_sources import BlobSources, PublishedBatches, PullThrough
from obdelta.web.devices.file_body import DownloadTimes
from obdelta.web.devices.legacy_batches import LegacyBatches
from obdelta.web.devices.rebuilt_layers import RebuiltLayers
from obdelta.web.devices.registry_api import RegistryApi
from obdelta.web.devices.retries import MAX_HELD, HeldAnswers, RefusedPairs
from obdelta.web.devices.stored_content import StoredContent
from obdelta.web.devices.v2 import MAX_PADDING, Batches, DelayedDevices, V2Policy
from obdelta.web.devices.v3 import DeltaApi
from obdelta.web.request import make_site, measure_connections, measured
from obdelta.web.request_traces import RequestTraces

DEVICES = HttpBounds(body=8 * 1024, methods=METHODS)
"""Limits of the devices' ports. No route takes a body, and Twisted would spend half a second on
each form of a megabyte before it is refused.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceParts:
    """The parts of the devices' endpoint that every server process has."""

    runtime: Runtime
    ingress: Ingress
    admission: Admission
    stored: StoredContent
    held: HeldAnswers
    signer: UrlSigner
    traces: RequestTraces
    proxies_ping: bool
    """Whether the upstream answers ``/v2/``, because it decides on devices' tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerParts:
    """The parts of the process that builds. Both endpoints are wired from them."""

    parts: Components
    service: DeltaService
    devices: DeviceParts
    published: BatchPublisher | None
    """v2 batches in the registry."""


async def open_device_parts(
    runtime: Runtime,
    ingress: Ingress,
    catalogue: Catalogue,
    blobs: BlobStore,
    key: bytes | None = None,
) -> DeviceParts:
    """Returns the parts of the devices' endpoint. The first process makes the key of URLs and sends
    it to the others as ``key``.
    """
    configured = runtime.settings
    requests = Limit(configured.max_requests, "requests of one client")
    runtime.metrics.devices.set_function(lambda: requests.keys)
    unprivileged = Limit(configured.max_builder_requests, "requests of builders from one address")
    grace = None  # an expired token fetches nothing
    if configured.pull_grace:
        grace = PullGrace(catalogue.started_pulls, configured.pull_grace, time.time)
    admission = Admission(ingress.access, requests, ingress.forwarded, grace, unprivileged)
    if key is None:
        key = await runtime.threads.run(url_key, configured)
    return DeviceParts(
        runtime=runtime,
        ingress=ingress,
        admission=admission,
        stored=StoredContent(
            catalogue=catalogue,
            blobs=blobs,
            admission=admission,
            times=DownloadTimes(catalogue, runtime.reactor, time.time),
            now=time.time,
        ),
        held=make_held_answers(runtime),
        signer=UrlSigner(key, time.time, configured.v2_url_lifetime),
        traces=RequestTraces(time.time),
        proxies_ping=configured.auth == "none" and configured.upstream_credentials == "device",
    )


def url_key(configured: Settings) -> bytes:
    """Returns the key that signs URLs of v2 batches. Replicas derive the same one from the secret
    that they share, so that each accepts the URLs of the others. Blocking.
    """
    if configured.shared is not None:
        secret = configured.builder_token or configured.shared.password
        if secret:
            return derive_key(secret)
    return load_key(configured.state_dir / "url-key")


def make_device_app(server: ServerParts) -> DeviceApp:
    """Returns the application of the devices' endpoint."""
    parts, service, devices = server.parts, server.service, server.devices
    stored, api = devices.stored, make_delta_api(server)
    rebuilt = RebuiltLayers(service, parts.state.catalogue, stored, parts.threads)
    registry = RegistryApi(
        upstream=parts.upstream,
        service=service,
        stored=stored,
        blobs=BlobSources(stored, rebuilt, make_pull_through(parts)),
        admission=devices.admission,
        policy=parts.policy,
        tags=parts.tags,
        proxy_ping=devices.proxies_ping,
    )
    batches = make_batches(server, api)
    return DeviceApp(api, batches, registry, devices.held, devices.admission, devices.traces)


def make_delta_api(server: ServerParts) -> DeltaApi:
    """Returns the API that answers delta requests."""
    parts, configured = server.parts, server.parts.settings
    return DeltaApi(
        server.service,
        server.devices.admission,
        parts.policy,
        registry_hosts=configured.registry_hosts,
        public_host=configured.public_host,
        own_credentials=own_credentials(configured),
        tags=parts.tags,
        held=server.devices.held,
        refused=RefusedPairs(parts.reactor),
        manifests=configured.publish == "serve",
        record_update=parts.state.catalogue.requested_updates.note,
    )


def make_batches(server: ServerParts, api: DeltaApi) -> Batches:
    """Returns the API of v2."""
    parts, configured, devices = server.parts, server.parts.settings, server.devices
    delayed_devices = DelayedDevices(parts.reactor.seconds)
    parts.readiness.notes.append(delayed_devices.note)
    legacy = None
    if configured.delta_rsync:
        legacy = LegacyBatches(configured.delta_rsync, devices.admission, parts.threads)
    # Another replica cannot serve a batch that is still being written here.
    streaming = "never" if configured.shared is not None else configured.v2_streaming
    return Batches(
        api=api,
        service=server.service,
        stored=devices.stored,
        signer=devices.signer,
        public_url=configured.public_url,
        policy=V2Policy(
            streaming=streaming != "never",
            max_padding_share=MAX_PADDING if streaming == "padded" else None,
            full_pull=configured.v2_full_pull,
        ),
        out_of_sync=out_of_sync(),
        delayed_out_of_sync=delayed_out_of_sync(),
        delayed_devices=delayed_devices,
        legacy_batches=legacy,
        published=make_published_batches(server),
    )


def make_published_batches(server: ServerParts) -> PublishedBatches | None:
    """Returns the source of v2 batches in the registry, None if none are pushed there."""
    parts, published = server.parts, server.published
    if published is None:
        return None
    state, quota = parts.state, parts.settings.store_quota
    source = PullThrough(
        parts.upstream, parts.upstream_blobs, state.catalogue, parts.reactor, quota
    )
    return PublishedBatches(published, source, push_credentials(parts.settings))


def make_held_answers(runtime: Runtime) -> HeldAnswers:
    """Returns the holder of answers that mean "ask again". Each held answer is an open connection:
    half of the open files stay free for other work.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_HELD if files == resource.RLIM_INFINITY else min(MAX_HELD, files // 2)
    return HeldAnswers(runtime.reactor, runtime.settings.request_timeout, most)


def make_pull_through(parts: Components) -> PullThrough | None:
    """Returns the cache of upstream blobs, None for layouts, which are on a disk already. A blob of
    more than a quarter of the quota is not kept.
    """
    configured = parts.settings
    if isinstance(configured.upstream, OciLayouts):
        return None
    return PullThrough(
        parts.upstream,
        parts.upstream_blobs,
        parts.state.catalogue,
        parts.reactor,
        configured.store_quota // 4,
    )


def make_device_site(devices: DeviceParts, app: IResource) -> BoundedSite:
    """Returns the site of the devices' ports."""
    runtime, ingress = devices.runtime, devices.ingress
    site = make_site(
        app,
        runtime.reactor,
        clients=ingress.forwarded,
        connections=Limit(runtime.settings.max_connections, "connections from one address"),
        exempt=ingress.forwarding,
        ended=measured(runtime.metrics, "devices", device_route),
        bounds=DEVICES,
    )
    measure_connections(runtime.metrics, "devices", site)
    return site


async def listen_for_devices(devices: DeviceParts, app: DeviceApp) -> list[IListeningPort]:
    """Returns the open ports of devices. The caller stops them."""
    runtime, ingress = devices.runtime, devices.ingress
    return await listen(
        runtime.settings.listen,
        make_device_site(devices, app),
        runtime.reactor,
        certificates=ingress.certificates,
        proxies=ingress.proxies if runtime.settings.proxy_protocol else None,
    )
