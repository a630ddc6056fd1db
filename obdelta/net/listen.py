"""Endpoint strings to listening ports, with TLS and the PROXY protocol in front of HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, IPPROTO_TCP, TCP_NOTSENT_LOWAT
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.protocols.tls import TLSMemoryBIOFactory

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import SettingsError
from obdelta.net.certificates import Certificates, WholePieces
from obdelta.net.client_address import ProxiedFactory, TrustedProxies
from obdelta.net.http_limits import accept_few

BACKLOG = 4096
"""Connections that may wait to be accepted (``net.core.somaxconn`` of the kernel bounds it too).

A fleet connects all at once, and a client whose connection finds the backlog full retries only
after a second. Twisted's default is 50.
"""

MAX_UNSENT = 256 * 1024
"""Bytes of a connection that the kernel takes before it can send them (Linux, ``tcp.7``:
``TCP_NOTSENT_LOWAT``).

A slow device would otherwise hold megabytes of kernel memory, and what it has received would be
known too late to measure its pace (``web/devices/file_body.py``).
"""


def with_layers(
    site: IProtocolFactory,
    clock: IReactorTime,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
) -> IProtocolFactory:
    """Returns the site behind TLS if there are certificates, and behind the PROXY protocol if
    there are proxies.

    The PROXY header is outermost: a proxy that passes TLS through sends it before the client's
    first byte.
    """
    factory = site
    if certificates is not None:
        factory = TLSMemoryBIOFactory(certificates, False, factory, clock)
        factory.noisy = False
        factory.protocol = WholePieces
    if proxies is not None:
        factory = ProxiedFactory(factory, proxies, clock)
    return factory


def parse_endpoint(
    text: str, reactor: IReactor, *, layers: bool = False, setting: str = "listen"
) -> IStreamServerEndpoint:
    """Returns a Twisted server endpoint. ``layers``: TLS or the PROXY protocol will be added to it.
    Raises SettingsError.
    """
    kind = text.partition(":")[0]
    if (
        kind == "haproxy"
    ):  # Twisted's wrapper trusts every address and wants the whole header in the first segment
        raise SettingsError(
            setting, text, "a plain endpoint (tcp:8080), with proxy-from = proxy-protocol"
        )
    if kind == "ssl" and layers:
        raise SettingsError(
            setting, text, "a tcp: endpoint; TLS comes from tls-certificate and tls-key"
        )
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, text)
    except (
        Exception
    ) as error:  # each kind of endpoint has its own parser, which may also open files
        raise SettingsError(
            setting,
            text,
            "a Twisted server endpoint string (tcp:8080, or tcp:8080:interface=127.0.0.1)",
        ) from error
    return endpoint


async def listen(
    endpoints: Sequence[str],
    site: IProtocolFactory,
    reactor: IReactor,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
    setting: str = "listen",
) -> list[IListeningPort]:
    """Listens on all the endpoints, with the same layers. The caller stops the ports.

    Raises SettingsError (for the key ``setting``) if one is no endpoint or cannot be opened.
    Then none is left open.
    """
    layers = certificates is not None or proxies is not None
    parsed = [
        (text, parse_endpoint(text, reactor, layers=layers, setting=setting)) for text in endpoints
    ]
    factory = with_layers(site, reactor, certificates=certificates, proxies=proxies)
    ports: list[IListeningPort] = []
    try:
        for text, endpoint in parsed:
            try:
                port = await endpoint.listen(factory)
                ports.append(port)
                if (listening := getattr(port, "socket", None)) is not None:
                    listening.listen(BACKLOG)
                    if listening.family in (AF_INET, AF_INET6):
                        listening.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT)
                    accept_few(port)
            except (
                Exception
            ) as error:  # CannotListenError, and whatever errors of plug-in endpoints
                raise SettingsError(
                    setting, text, f"an address that can be listened on ({_reason(error)})"
                ) from error
    except BaseException:
        for port in ports:
            await maybeDeferred(port.stopListening)
        raise
    return ports


def url(port: IListeningPort) -> str:
    """Returns a port's address as a URL, for people: ``https://0.0.0.0:443``, ``unix:/run/…``."""
    host: Any = port.getHost()
    if not isinstance(host, IPv4Address | IPv6Address):
        return f"unix:{os.fsdecode(host.name or b'')}"
    factory: Any = getattr(port, "factory", None)
    while factory is not None and not isinstance(factory, TLSMemoryBIOFactory):
        factory = getattr(factory, "wrappedFactory", None)
    name = f"[{host.host}]" if isinstance(host, IPv6Address) else host.host
    return f"{'http' if factory is None else 'https'}://{name}:{host.port}"


def _reason(error: Exception) -> str:
    cause = getattr(error, "socketError", error)
    return getattr(cause, "strerror", None) or type(cause).__name__
