"""``processes = N``: starts N - 1 further server processes that serve the devices' ports."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort

from obdelta.app.devices import (
    DEVICES,
    make_clients,
    make_held_answers,
    make_pull_grace,
    relays_ping,
)
from obdelta.app.factories import make_access, make_certificates
from obdelta.app.reload import reload_files
from obdelta.app.state import Closers, State
from obdelta.concurrency.limits import Limit
from obdelta.concurrency.threads import Threads
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.net.listen import accept_few, layered
from obdelta.net.private_socket import PrivateEndpoint, listen_privately
from obdelta.observability import Metrics
from obdelta.processes.server_processes import FIRST_INHERITED, Processes
from obdelta.settings import Settings, table
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.ownership import CATALOGUE
from obdelta.web.devices.admission import Admission
from obdelta.web.devices.app import DeviceApp, NamedRequest, QuietSite, make_site
from obdelta.web.devices.forwarding import BOUNDS, Forwarder, ForwardingApp
from obdelta.web.devices.signed_urls import UrlSigner, load_key
from obdelta.web.devices.stored_content import StoredContent
from obdelta.web.request_metrics import measure_connections, measured

_FOLDER = FIRST_INHERITED
_FIRST_PORT = FIRST_INHERITED + 1
_MODULE = "obdelta.app.server_process"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first message to a further server process: the settings, and the address families of the
    listening sockets that it inherits.
    """

    settings: Settings
    families: tuple[int, ...]


async def start_further(
    configured: Settings,
    reactor: Any,
    face: DeviceApp,
    ports: Sequence[IListeningPort],
    state: State,
    metrics: Metrics,
    closers: Closers,
) -> Further | None:
    """Starts the further processes once the devices' ports are open. Returns None where there are
    none.
    """
    if configured.processes == 1:
        return None
    for text in configured.listen:
        if text.startswith("ssl:"):
            raise SettingsError(
                "listen",
                text,
                "a tcp: endpoint (TLS comes from tls-certificate), with processes > 1",
            )
    shared = [found for port in ports if (found := getattr(port, "socket", None)) is not None]
    shared = [found for found in shared if found.family in (socket.AF_INET, socket.AF_INET6)]
    if not shared:
        raise SettingsError(
            "listen", " ".join(configured.listen), "a tcp: endpoint among them, with processes > 1"
        )
    # A further process has already logged the request that it forwards.
    site = QuietSite(face, requestFactory=NamedRequest, reactor=reactor, bounds=BOUNDS)
    port, folder = listen_privately(state.blobs.temporary(".socket"), site, reactor)
    families = tuple(found.family for found in shared)
    processes = Processes(
        reactor,
        [sys.executable, "-P", "-m", _MODULE],
        _beginning(configured, families),
        [folder, *(found.fileno() for found in shared)],
        configured.processes - 1,
        metrics,
    )

    async def close() -> None:
        processes.end(configured.drain)
        await processes.ended()
        await maybeDeferred(port.stopListening)
        os.close(folder)

    closers.append(close)
    processes.start()
    return Further(processes, configured, families)


class Further:
    """Handle on the further processes for the rest of the server."""

    def __init__(
        self, processes: Processes, configured: Settings, families: tuple[int, ...]
    ) -> None:
        self._processes, self._configured, self._families = processes, configured, families
        self.describe, self.end = processes.describe, processes.end

    def reload(self, levels: Mapping[str, str]) -> None:
        """Makes the processes read their files again, with other log levels. Processes that start
        later get these levels too.
        """
        self._configured = dataclasses.replace(self._configured, log_level=dict(levels))
        self._processes.beginning = _beginning(self._configured, self._families)
        self._processes.tell(json.dumps({"log_level": dict(levels)}).encode())


def _beginning(configured: Settings, families: tuple[int, ...]) -> bytes:
    """Returns the first message to a further process. It holds no secret setting: the process needs
    none, and it parses untrusted input.
    """
    secrets = {row.field: None for row in table() if row.secret}
    plain = dataclasses.replace(
        configured,
        origins=dict(configured.origins),
        texts=dict(configured.texts),
        log_level=dict(configured.log_level),
        **secrets,  # type: ignore[arg-type]
    )
    return pickle.dumps(Beginning(plain, families))


async def serve_further(
    beginning: Beginning, reactor: Any, threads: Threads, metrics: Metrics, closers: Closers
) -> tuple[ForwardingApp, list[IListeningPort], Callable[[Mapping[str, str]], None]]:
    """Runs in a further process: opens what it needs and begins to accept. The caller stops the
    ports.

    Returns a function that reads files again, as SIGHUP does.
    """
    configured = beginning.settings
    access = make_access(configured, time.time)
    certificates = make_certificates(configured, reactor.seconds)
    clients = make_clients(configured)
    # The parent process has already opened, swept and migrated the state.
    blobs = BlobStore(configured.state_dir, threads)
    path = configured.state_dir / CATALOGUE
    catalogue = await Catalogue.open(path, reactor, blobs=blobs, recipe=RECIPE, check=False)
    closers.append(catalogue.close)
    requests = Limit(configured.max_requests, "requests of one client")
    metrics.devices.set_function(lambda: requests.keys)
    admission = Admission(
        access, requests, clients.forwarded, make_pull_grace(configured, catalogue)
    )
    key = await threads.run(load_key, configured.state_dir / "url-key")
    face = ForwardingApp(
        finished=StoredContent(
            catalogue=catalogue, blobs=blobs, admission=admission, now=time.time
        ),
        admission=admission,
        signer=UrlSigner(key, time.time, configured.v2_url_lifetime),
        forwarder=Forwarder(
            lambda client: PrivateEndpoint(reactor, _FOLDER, client), clients.forwarded, reactor
        ),
        forward_ping=relays_ping(configured),
        held=make_held_answers(configured, reactor),
    )
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
    factory = layered(
        site,
        reactor,
        certificates=certificates,
        proxies=clients.proxies if configured.proxy_protocol else None,
    )
    ports = []
    for place, family in enumerate(beginning.families):
        ports.append(reactor.adoptStreamPort(_FIRST_PORT + place, family, factory))
        accept_few(ports[-1])
        os.close(_FIRST_PORT + place)
    return face, ports, reload_files(certificates, access)
