"""``twistd obdelta``: options, and the one place where the rooms are wired together."""

from __future__ import annotations

import atexit
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.application.service import IService, Service
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.threadpool import ThreadPool

from obdelta import __version__, settings
from obdelta.builds.coordinator import Coordinator
from obdelta.builds.images import ImageLookup
from obdelta.builds.layers import LayerImporter
from obdelta.builds.pool import WorkerPool
from obdelta.builds.trees import TreeMaker
from obdelta.builds.v2 import RsyncV2
from obdelta.builds.v3 import NativeV3
from obdelta.errors import ObdeltaError, SettingsError
from obdelta.net import tls
from obdelta.net.limits import Limit
from obdelta.net.listen import listen
from obdelta.net.proxy import ForwardedClients, TrustedProxies
from obdelta.registry import CredentialPolicy, DeviceCredentials, OwnCredentials, Upstream
from obdelta.registry.client import RegistryClient
from obdelta.registry.layout import LayoutUpstream
from obdelta.rootfs.batch import out_of_sync
from obdelta.settings import OciLayouts, Settings
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue import Catalogue
from obdelta.store.layers import LayerCache
from obdelta.store.threads import Threads
from obdelta.store.trees import TreeCache
from obdelta.web.access import Access, OpenAccess, token_access
from obdelta.web.admission import Admission
from obdelta.web.batches import Batches, V2Policy
from obdelta.web.delta_api import DeltaApi
from obdelta.web.distribution import Distribution
from obdelta.web.operators import OperatorFace
from obdelta.web.signing import UrlSigner, load_key
from obdelta.web.site import Face, make_site

log = Logger()

_THREADS = 8
"""For file work; hashing and writing are short, and two cores do not gain from more."""
WORKER_NICENESS = 10


class Options(usage.Options):
    """Every setting is a long option of its name (``docs/settings.md``)."""

    synopsis = "[options]"
    longdesc = "Delta updates for openBalena devices: a streaming proxy before the registry."
    optParameters = [  # noqa: RUF012 - Twisted reads it as a plain class attribute
        ["config", "c", os.environ.get("OBDELTA_CONFIG"), "the settings file (tap.conf)"],
        *([row.key, None, None, row.meaning] for row in settings.table() if not row.secret),
    ]

    def opt_version(self) -> None:
        """Print obdelta's version and exit."""
        sys.stdout.write(f"obdelta {__version__}\n")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """Reads the settings; one line on stderr and exit status 1 where they cannot be used."""
        given = {key: value for key, value in self.items() if key != "config"}
        try:
            self.settings = settings.read(given, os.environ, Path(self["config"]) if self["config"] else None)
            make_access(self.settings, time.time)
        except SettingsError as error:
            raise SystemExit(f"obdelta: {error}") from error


def make_upstream(configured: Settings, reactor: Any, threads: Threads) -> Upstream:
    """The upstream that the settings name."""
    if isinstance(configured.upstream, OciLayouts):
        return LayoutUpstream(configured.upstream.path, threads)
    return RegistryClient.connect(reactor, configured.upstream.url, threads, ca=configured.upstream_ca)


def make_policy(configured: Settings) -> CredentialPolicy:
    """Whose credentials go to the upstream."""
    if configured.upstream_credentials == "device":
        return DeviceCredentials()
    if configured.upstream_credentials == "builder":
        if configured.builder_token is None:
            raise SettingsError("builder-token", None, "the builder's token")
        return OwnCredentials.builder(configured.builder_token)
    return OwnCredentials.none()


def make_access(configured: Settings, now: Callable[[], float]) -> Access:
    """Who decides on requests. Raises SettingsError without a key: no key, no service."""
    if configured.auth == "none":
        return OpenAccess()
    return token_access(
        key=configured.auth_key,
        algorithms=configured.jwt_algorithm,
        issuer=configured.auth_issuer,
        audiences=configured.auth_audience,
        realm=configured.auth_realm,
        service=configured.auth_service,
        now=now,
    )


class Server(Service):
    """The running proxy: opens the state, wires the rooms, listens; and takes it all down again."""

    def __init__(self, configured: Settings, reactor: Any) -> None:
        self._settings, self._reactor = configured, reactor
        self._threads = ThreadPool(1, _THREADS, "obdelta")
        self._ports: list[IListeningPort] = []
        self._starting: Deferred[None] | None = None
        self._closers: list[Any] = []

    def startService(self) -> None:
        """Starts listening once the state is open; a start that fails stops the process with status 1."""
        super().startService()  # type: ignore[no-untyped-call] # Twisted's
        self._threads.start()
        # Every waiting device is an open connection; the soft limit is often 1024 for the sake of select().
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._reactor.callWhenRunning(self._stop_on_sigterm)
        self._starting = ensureDeferred(self._start())
        self._starting.addErrback(self._failed)

    def _stop_on_sigterm(self) -> None:
        # Twisted's own handler ends the process *by* the signal; whoever asked for an orderly end should see status 0.
        signal.signal(signal.SIGTERM, lambda *_: self._reactor.callFromThread(self._reactor.stop))

    def _failed(self, failure: Any) -> None:
        if failure.check(CancelledError):
            return  # stopped before it was up
        if isinstance(failure.value, ObdeltaError | OSError):
            log.critical("obdelta cannot start: {reason}", reason=str(failure.value))
        else:
            log.failure("obdelta cannot start", failure)
        # twistd tidies its pid file after the reactor has ended and then exits with 0; this makes it a 1.
        atexit.register(os._exit, 1)
        self._reactor.callWhenRunning(self._reactor.stop)

    async def _start(self) -> None:
        configured, reactor = self._settings, self._reactor
        if configured.auth == "none":
            log.warn("AUTH IS OFF (auth = none): whoever reaches this server may pull everything that it may pull")
        access = make_access(configured, reactor.seconds)
        proxies = TrustedProxies(configured.proxy_from)
        pairs = tls.pairs(configured.tls_certificate, configured.tls_key)
        certificates = tls.Certificates(pairs, reactor.seconds) if pairs else None
        threads = Threads(reactor, self._threads)
        try:
            blobs = BlobStore(configured.state_dir, threads)
        except OSError as error:
            raise SettingsError(
                "state-dir", str(configured.state_dir), f"a folder that can be written ({error.strerror})"
            ) from error
        await blobs.sweep()
        catalogue = await Catalogue.open(configured.state_dir / "catalogue.sqlite", reactor)
        self._closers.append(catalogue.close)
        await catalogue.sweep(blobs)
        cache = await LayerCache.open(configured.state_dir, threads, configured.layer_cache, reactor.seconds)
        upstream = make_upstream(configured, reactor, threads)
        self._closers.append(upstream.close)
        policy = make_policy(configured)
        pool = WorkerPool(reactor, configured.max_builds + 1, configured.worker_memory, WORKER_NICENESS)
        self._closers.append(pool.close)
        importer = LayerImporter(
            upstream=upstream,
            blobs=blobs,
            cache=cache,
            catalogue=catalogue,
            pool=pool,
            max_layer=configured.max_layer,
            job_seconds=configured.build_timeout,
        )
        v3 = NativeV3(
            clock=reactor,
            upstream=upstream,
            importer=importer,
            blobs=blobs,
            catalogue=catalogue,
            pool=pool,
            effort=configured.effort,
            threads=len(os.sched_getaffinity(0)),
            worth=configured.worth,
            index_dir=str(cache.root),
            job_seconds=configured.build_timeout,
        )
        trees = TreeMaker(
            importer=importer,
            cache=await TreeCache.open(configured.state_dir, threads, configured.layer_cache, reactor.seconds),
            blobs=blobs,
            pool=pool,
            job_seconds=configured.build_timeout,
        )
        v2 = RsyncV2(
            reactor=reactor,
            upstream=upstream,
            trees=trees,
            blobs=blobs,
            catalogue=catalogue,
            worth=configured.worth,
            job_seconds=configured.build_timeout,
        )
        coordinator = Coordinator(
            clock=reactor,
            catalogue=catalogue,
            lookup=ImageLookup(upstream, reactor),
            builders={"v3": v3, "v2": v2},
            max_builds=configured.max_builds,
            build_seconds=configured.build_timeout,
            failure_memory=configured.failure_memory,
            queued=Limit(configured.max_queued_builds, "builds of one asker"),
        )
        self._closers.append(coordinator.close)
        # With the PROXY protocol each connection is its device; without, a proxy's connections bring many.
        forwarding = None if configured.proxy_protocol else proxies
        clients = ForwardedClients(forwarding)
        admission = Admission(access, Limit(configured.max_requests, "requests of one asker"), clients)
        api = DeltaApi(
            coordinator,
            admission,
            policy,
            registry_hosts=configured.registry_hosts,
            public_host=configured.public_host,
            hold=configured.hold,
        )
        key = await threads.run(load_key, configured.state_dir / "url-key")
        batches = Batches(
            api=api,
            coordinator=coordinator,
            catalogue=catalogue,
            blobs=blobs,
            signer=UrlSigner(key, reactor.seconds, configured.v2_url_lifetime),
            public_url=configured.public_url,
            policy=V2Policy(configured.v2_streaming == "auto", configured.v2_full_pull),
            out_of_sync=await blobs.put(out_of_sync()),
        )
        face = Face(
            api,
            batches,
            Distribution(
                upstream=upstream,
                coordinator=coordinator,
                blobs=blobs,
                catalogue=catalogue,
                admission=admission,
                policy=policy,
                relay_ping=configured.auth == "none" and policy.passes_device_credentials,
                clock=reactor,
            ),
        )
        connections = Limit(configured.max_connections, "connections from one address")
        site = make_site(face, reactor, clients=clients, connections=connections, exempt=forwarding)
        self._ports += await listen(
            configured.listen,
            site,
            reactor,
            certificates=certificates,
            proxies=proxies if configured.proxy_protocol else None,
        )
        operators = make_site(OperatorFace(coordinator, blobs, reactor), reactor, clients=ForwardedClients(None))
        self._ports += await listen(configured.operator_listen, operators, reactor, setting="operator-listen")
        for port in self._ports:
            log.info("listening on {address}", address=str(port.getHost()))

    def stopService(self) -> Deferred[None]:
        """Stops listening, calls builds off, closes what was opened, in the reverse order."""
        super().stopService()  # type: ignore[no-untyped-call] # Twisted's
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        for close in reversed(self._closers):
            try:
                await close()
            except Exception:  # a full disk, say: the rest must be closed all the same, or the process never ends
                log.failure("closing what was open")
        self._threads.stop()


def makeService(options: Options) -> IService:
    """What twistd calls."""
    return Server(options.settings, installed_reactor)
