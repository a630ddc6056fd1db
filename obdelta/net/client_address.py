"""Client addresses behind a proxy: the PROXY protocol before TLS, forwarding headers after it."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from twisted.internet.address import IPv4Address as TCP4
from twisted.internet.address import IPv6Address as TCP6
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocolFactory,
    IReactorTime,
    ITransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.http import Request

from obdelta.errors import SettingsError
from obdelta.net.proxy_protocol import Endpoint, ProxyHeader, ProxyHeaderInvalid, ProxyHeaderParser

HEADER_TIMEOUT = 5.0
"""Seconds within which the PROXY header must arrive. Proxies send it when they connect."""


def host_of(address: object) -> str:
    """Returns the IP address in canonical text, IPv4-mapped ones as IPv4. Other kinds (Unix
    sockets) give ``""``.
    """
    if not isinstance(address, TCP4 | TCP6):
        return ""
    parsed = ip_address(address.host.partition("%")[0])
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed)


class TrustedProxies:
    """The proxies that are trusted to name a client's address (setting ``proxy-from``)."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises SettingsError for text that is no address or network (``10.0.0.0/8``,
        ``fd00::/8``, ``192.0.2.7``).
        """
        self._networks: list[IPv4Network | IPv6Network] = []
        for text in networks:
            try:
                self._networks.append(ip_network(text.strip()))
            except ValueError as error:
                raise SettingsError(
                    "proxy-from", text, f"IP addresses or networks: {error}"
                ) from error

    def trusts(self, address: IAddress | None) -> bool:
        """Returns whether a connection from this address may name its client. Unix sockets may:
        their file mode decides on access.
        """
        host = host_of(address)
        if not host:
            return address is not None
        parsed = ip_address(host)
        return any(parsed in network for network in self._networks)


class ProxiedProtocol(ProtocolWrapper):
    """Reads the PROXY header, then is the transport of a protocol whose peer is the real client.

    The inner protocol is only built when the header is whole, so it never has a wrong peer. Before
    that, and after a refusal, a protocol that ignores everything takes its place.
    """

    factory: ProxiedFactory
    transport: Any  # a TCP or Unix server transport
    _log = Logger()

    def __init__(self, factory: ProxiedFactory) -> None:
        super().__init__(factory, Protocol())
        self._parser: ProxyHeaderParser | None = ProxyHeaderParser()
        self._timeout: IDelayedCall | None = None
        self._header = ProxyHeader()

    def makeConnection(self, transport: ITransport) -> None:
        """Refuses untrusted peers, and waits for the header of the others."""
        ProtocolWrapper.makeConnection(self, transport)
        if not self.factory.proxies.trusts(transport.getPeer()):
            self._refuse("it is not among proxy-from")
            return
        self._timeout = self.factory.clock.callLater(
            HEADER_TIMEOUT, self._refuse, "it sent no PROXY header in time"
        )

    def dataReceived(self, data: bytes) -> None:
        """Collects header bytes until the header is whole, then passes all bytes on."""
        if self._parser is None:
            self.wrappedProtocol.dataReceived(data)
            return
        try:
            result = self._parser.feed(data)
        except ProxyHeaderInvalid as error:
            self._refuse(str(error))
            return
        if result is None:
            return
        self._header, rest = result
        self._stop_waiting()
        inner = self.factory.wrappedFactory.buildProtocol(self.getPeer())
        if inner is None:
            self.transport.abortConnection()
            return
        self.wrappedProtocol = inner
        inner.makeConnection(self)
        if rest:
            inner.dataReceived(rest)

    def _refuse(self, why: str) -> None:
        self._stop_waiting()
        self._log.info(
            "connection from {peer} refused: {why}", peer=host_of(self.transport.getPeer()), why=why
        )
        self.transport.abortConnection()

    def _stop_waiting(self) -> None:
        self._parser = None
        if self._timeout is not None and self._timeout.active():
            self._timeout.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Called for connections without a whole header, too."""
        self._stop_waiting()
        ProtocolWrapper.connectionLost(self, reason)

    def getPeer(self) -> IAddress:
        """Returns the client behind the proxy, or the proxy if it speaks for itself."""
        return _address(self._header.source) or self.transport.getPeer()

    def getHost(self) -> IAddress:
        """Returns the address that the client connected to."""
        return _address(self._header.destination) or self.transport.getHost()


def _address(end: Endpoint | None) -> IAddress | None:
    if end is None:
        return None
    return (TCP4 if end.family == 4 else TCP6)("TCP", end.host, end.port)


class ProxiedFactory(WrappingFactory[ProxiedProtocol]):
    """Passes connections that begin with a PROXY header to the wrapped factory, and
    refuses others.
    """

    noisy = False

    def __init__(
        self, wrapped: IProtocolFactory, proxies: TrustedProxies, clock: IReactorTime
    ) -> None:
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.proxies, self.clock = proxies, clock

    def buildProtocol(self, addr: IAddress | None) -> ProxiedProtocol:
        """Returns a protocol that builds its inner one later."""
        return ProxiedProtocol(self)


class ForwardedClients:
    """Finds a request's client if TLS ends at a proxy (``X-Forwarded-For``,
    ``X-Forwarded-Proto``).

    With the PROXY protocol the connection knows its client, and such headers come from that client:
    they are ignored (``proxies`` None). The same holds if TLS ends here.
    """

    def __init__(self, proxies: TrustedProxies | None) -> None:
        self._proxies = proxies

    def address(self, request: Request) -> str:
        """Returns the client's IP address, ``""`` if it has none (Unix sockets)."""
        named = self._last(request, b"x-forwarded-for")
        if named is not None:
            # Only the last entry comes from the trusted proxy. Clients can forge those before it.
            try:
                return host_of(TCP6("TCP", str(ip_address(named.strip("[]"))), 0))
            except ValueError:
                pass
        return host_of(request.getClientAddress())

    def secure(self, request: Request) -> bool:
        """Returns whether the client uses TLS, with this server or with the proxy."""
        return request.isSecure() or self._last(request, b"x-forwarded-proto") == "https"

    def comes_from_proxy(self, request: Request) -> bool:
        """Returns whether a trusted proxy sent the request."""
        trusted = self._proxies is not None and self._proxies.trusts(request.getClientAddress())
        return trusted and not request.isSecure()

    def _last(self, request: Request, header: bytes) -> str | None:
        if not self.comes_from_proxy(request):
            return None
        lines = request.requestHeaders.getRawHeaders(header)
        if not lines:
            return None
        return lines[-1].rpartition(b",")[2].strip().decode("latin-1").lower() or None
