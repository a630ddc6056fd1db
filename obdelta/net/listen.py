"""Endpoint strings to listening services, with what stands between the socket and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import MultiService
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IProtocolFactory
from twisted.protocols.tls import TLSMemoryBIOFactory

from obdelta.errors import SettingsError
from obdelta.net.proxy import ProxiedFactory, TrustedProxies
from obdelta.net.tls import Certificates


def layered(
    site: IProtocolFactory,
    clock: Any,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
) -> IProtocolFactory:
    """The site behind TLS where there are certificates, behind the PROXY protocol where there are proxies.

    The PROXY header is outermost: a proxy that passes TLS through sends it before the client's first byte.
    """
    factory = site
    if certificates is not None:
        factory = TLSMemoryBIOFactory(certificates, False, factory, clock)
    if proxies is not None:
        factory = ProxiedFactory(factory, proxies, clock)
    return factory


def listening(
    endpoints: Sequence[str],
    site: IProtocolFactory,
    reactor: Any,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
    setting: str = "listen",
) -> MultiService:
    """A service that listens on Twisted server endpoint strings while it runs; all of them are layered alike.

    Raises SettingsError (for the key ``setting``) for strings that cannot be used. A port that is taken raises
    CannotListenError when the service starts.
    """
    services = MultiService()
    factory = layered(site, reactor, certificates=certificates, proxies=proxies)
    for text in endpoints:
        kind = text.partition(":")[0]
        if kind == "haproxy":
            raise SettingsError(setting, text, "proxy-protocol = yes in place of the haproxy: prefix")
        if kind == "ssl" and (certificates is not None or proxies is not None):
            raise SettingsError(setting, text, "a tcp: endpoint, TLS is added by tls-certificate and tls-key")
        try:
            endpoint = serverFromString(reactor, text)
        except Exception as error:  # each kind of endpoint has its own parser, which may also open files
            raise SettingsError(setting, text, "a Twisted server endpoint string (tcp:8080)") from error
        service = StreamServerEndpointService(endpoint, factory)
        # Twisted's own strports.service does the same: a port that is taken must stop the start, not be a line in the log.
        service._raiseSynchronously = True
        services.addService(service)
    return services
