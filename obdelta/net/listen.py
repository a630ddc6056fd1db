"""Endpoint strings to listening ports, with TLS and the PROXY protocol in front of HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.protocols.tls import TLSMemoryBIOFactory

from obdelta.errors import SettingsError
from obdelta.net.certificates import Certificates, WholePieces
from obdelta.net.client_address import ProxiedFactory, TrustedProxies

BACKLOG = 4096
"""Connections that may wait to be accepted (``net.core.somaxconn`` of the kernel bounds it too).

A fleet connects all at once, and a client whose connection finds the backlog full retries only
after a second. Twisted's default is 50.
"""

ACCEPT_AT_ONCE = 8


def layered(
    site: IProtocolFactory,
    clock: Any,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
) -> IProtocolFactory:
    """Returns the site behind TLS where there are certificates, and behind the PROXY protocol where
    there are proxies.

    The PROXY header is outermost: a proxy that passes TLS through sends it before the client's
    first byte.
    """
    factory = site
    if certificates is not None:
        factory = TLSMemoryBIOFactory(certificates, False, factory, clock)
        factory.protocol = WholePieces
    if proxies is not None:
        factory = ProxiedFactory(factory, proxies, clock)
    return factory


def parse_endpoint(
    text: str, reactor: Any, *, layers: bool = False, setting: str = "listen"
) -> IStreamServerEndpoint:
    """Returns a Twisted server endpoint. ``layers``: TLS or the PROXY protocol will be added to it.
    Raises SettingsError.
    """
    kind = text.partition(":")[0]
    if (
        kind == "haproxy"
    ):  # Twisted's wrapper trusts every address and wants the whole header in the first segment
        raise SettingsError(setting, text, "a plain endpoint (tcp:8080), with proxy-protocol = yes")
    if kind == "ssl" and layers:
        raise SettingsError(
            setting, text, "a tcp: endpoint; TLS comes from tls-certificate and tls-key"
        )
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, text)
    except (
        Exception
    ) as error:  # each kind of endpoint has its own parser, which may also open files
        raise SettingsError(setting, text, "a Twisted server endpoint string (tcp:8080)") from error
    return endpoint


def accept_few(port: Any) -> None:
    """Makes a port accept a few connections in each turn of the reactor. Twisted accepts all that
    wait, up to thousands.

    Where several processes accept from one queue, the first one awake would get them all. A
    connection in the queue also costs less, and its time-out begins later.
    """
    accept = port.doRead

    def few() -> None:
        port.numberAccepts = ACCEPT_AT_ONCE
        accept()

    port.doRead = few


async def listen(
    endpoints: Sequence[str],
    site: IProtocolFactory,
    reactor: Any,
    *,
    certificates: Certificates | None = None,
    proxies: TrustedProxies | None = None,
    setting: str = "listen",
) -> list[IListeningPort]:
    """Listens on all the endpoints, with the same layers. The caller stops the ports.

    Raises SettingsError (for the key ``setting``) where one is no endpoint or cannot be opened.
    Then none is left open.
    """
    layers = certificates is not None or proxies is not None
    parsed = [
        (text, parse_endpoint(text, reactor, layers=layers, setting=setting)) for text in endpoints
    ]
    factory = layered(site, reactor, certificates=certificates, proxies=proxies)
    ports: list[IListeningPort] = []
    try:
        for text, endpoint in parsed:
            try:
                port = await endpoint.listen(factory)
                ports.append(port)
                if (listening := getattr(port, "socket", None)) is not None:
                    listening.listen(BACKLOG)
                    accept_few(port)
            except (
                Exception
            ) as error:  # CannotListenError, and whatever errors of plug-in endpoints
                raise SettingsError(
                    setting, text, f"an address that can be listened on ({_why(error)})"
                ) from error
    except BaseException:
        for port in ports:
            await maybeDeferred(port.stopListening)
        raise
    return ports


def _why(error: Exception) -> str:
    cause = getattr(error, "socketError", error)
    return getattr(cause, "strerror", None) or type(cause).__name__
