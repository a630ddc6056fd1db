"""Address rules (SSRF protection): which hosts the upstream may send this server to. Checked on
every connection.

The upstream redirects to object storage and names a token server, so it chooses hosts that this
server connects to. Hosts on loopback, link-local and private addresses are refused, unless the
upstream itself has such an address, or a setting names the host. Addresses are checked on
connection, since what a name resolves to may change.

Source: RFC 6890 and the RFCs it lists; RFC 6052 and RFC 3056 for IPv4 addresses inside IPv6 ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import (
    IAddress,
    IHostnameResolver,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
    IResolutionReceiver,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from twisted.web.client import URI
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor

_KINDS = {
    "loopback": ("127.0.0.0/8", "0.0.0.0/8", "::1/128", "::/128"),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    "private": (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
        "fec0::/10",
    ),
}
_NETWORKS = [
    (ip_network(network), kind) for kind, networks in _KINDS.items() for network in networks
]
_TRANSLATED = ip_network("64:ff9b::/96")


class RefusedAddress(ConnectError):
    """Raised if the upstream sent this server to a host whose addresses it may not use. ``str()``
    names only the host.
    """

    def __init__(self, host: str, kind: str) -> None:
        self.host, self.kind = host, kind
        super().__init__(string=f"{host} has a {kind} address")  # type: ignore[no-untyped-call] # Twisted's


def kind_of(address: str) -> str | None:
    """Returns ``loopback``, ``link-local`` or ``private``; None for any other address."""
    found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _TRANSLATED:
            inner = IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    return next((kind for network, kind in _NETWORKS if found in network), None)


class AddressRules:
    """The rules for connections. ``own``: hosts that settings name as upstream or realm, which are
    always allowed.

    ``allowed``: additional host names, addresses and networks that the upstream may use.
    """

    def __init__(self, upstream: str, own: Sequence[str] = (), allowed: Sequence[str] = ()) -> None:
        self._upstream = upstream.lower()
        self._own = {host.lower() for host in (upstream, *own)}
        self._networks: list[IPv4Network | IPv6Network] = []
        for one in allowed:
            try:
                self._networks.append(ip_network(one))
            except ValueError:
                self._own.add(one.lower())
        self._private_upstream_kinds: frozenset[str | None] = frozenset()

    def resolved(self, host: str, addresses: Sequence[str]) -> None:
        """Records what a name resolves to. An upstream counts as private only if it has no public
        address.
        """
        if host.lower() == self._upstream:
            kinds = frozenset(map(kind_of, addresses))
            self._private_upstream_kinds = kinds if None not in kinds else frozenset()

    def refused(self, host: str, address: str) -> str | None:
        """Returns the kind of an address of ``host``, if connections to it are refused."""
        kind = kind_of(address)
        if kind is None or host.lower() in self._own or kind in self._private_upstream_kinds:
            return None
        found = ip_address(address.partition("%")[0])
        return None if any(found in network for network in self._networks) else kind


@implementer(IResolutionReceiver)
class _Checked:
    """Passes on the allowed addresses; remembers the kind of a refused one."""

    def __init__(self, rules: AddressRules, host: str, receiver: IResolutionReceiver) -> None:
        self._rules, self._host, self._receiver = rules, host, receiver
        self._addresses: list[str] = []
        self.refused: str | None = None

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        self._receiver.resolutionBegan(resolutionInProgress)

    def addressResolved(self, address: IAddress) -> None:
        text = str(getattr(address, "host", ""))
        self._addresses.append(text)
        kind = self._rules.refused(self._host, text)
        if kind is None:
            self._receiver.addressResolved(address)
        else:
            self.refused = kind

    def resolutionComplete(self) -> None:
        self._rules.resolved(self._host, self._addresses)
        self._receiver.resolutionComplete()


@implementer(IHostnameResolver, IReactorPluggableNameResolver, IReactorTCP, IReactorTime)
class _CheckedReactor:
    """A reactor whose resolver leaves out refused addresses. For one connection."""

    def __init__(self, reactor: IReactor, rules: AddressRules, host: str) -> None:
        self._reactor, self._rules, self._host = reactor, rules, host
        self.receiver: _Checked | None = None

    @property
    def nameResolver(self) -> IHostnameResolver:
        return self

    def resolveHostName(
        self, resolutionReceiver: IResolutionReceiver, *more: Any, **named: Any
    ) -> IHostResolution:
        self.receiver = _Checked(self._rules, self._host, resolutionReceiver)
        found: IHostResolution = self._reactor.nameResolver.resolveHostName(
            self.receiver, *more, **named
        )
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)


@implementer(IStreamClientEndpoint)
class _CheckedEndpoint:
    def __init__(self, reactor: IReactor, rules: AddressRules, uri: URI, connect: float) -> None:
        self._reactor, self._rules, self._uri, self._connect = reactor, rules, uri, connect

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """Resolves, checks, connects. Fails with RefusedAddress if no address is left."""
        host = self._uri.host.decode("ascii")
        reactor = _CheckedReactor(self._reactor, self._rules, host)
        endpoint = HostnameEndpoint(reactor, host, self._uri.port, self._connect)

        def failed(failure: Failure) -> Failure:
            kind = None if reactor.receiver is None else reactor.receiver.refused
            return (
                Failure(RefusedAddress(host, kind))
                if kind and failure.check(DNSLookupError)
                else failure
            )

        connected: Deferred[IProtocol] = endpoint.connect(factory)
        return connected.addErrback(failed)


@implementer(IAgentEndpointFactory)
class CheckedEndpoints:
    """Creates an agent's endpoints; see :class:`AddressRules`."""

    def __init__(
        self, reactor: IReactor, trust: IPolicyForHTTPS, rules: AddressRules, connect: float
    ) -> None:
        self._reactor, self._trust, self._rules, self._connect = reactor, trust, rules, connect

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Returns the endpoint for one request's URI."""
        endpoint: IStreamClientEndpoint = _CheckedEndpoint(
            self._reactor, self._rules, uri, self._connect
        )
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(self._trust.creatorForNetloc(uri.host, uri.port), endpoint)
        return endpoint
