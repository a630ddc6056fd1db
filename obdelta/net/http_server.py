"""HTTP server for untrusted clients: a site whose connections are bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import IResource
from twisted.web.server import Site

from obdelta.concurrency.limits import DecayingLimit, Limit
from obdelta.net.client_address import TrustedProxies
from obdelta.net.http_channel import BoundedChannel
from obdelta.net.http_limits import ABANDONED_PER_SECOND, MAX_ABANDONED, HttpBounds


class BoundedSite(Site):
    """A site whose connections are :class:`BoundedChannel`.

    ``connections`` counts by address. Addresses that ``exempt`` trusts are proxies of many clients,
    and are not counted. ``takes_crowded`` selects paths whose requests above the limit reach the
    application, marked ``crowded``; others get 429. TLS clients are offered HTTP/1.1 only.
    ``open_connections`` is the number of open connections.

    An address that abandons more than :data:`MAX_ABANDONED` requests is not accepted for a while.
    This applies if connections are limited.
    """

    open_connections = 0

    protocol = BoundedChannel  # type: ignore[assignment]
    noisy = False

    def __init__(
        self,
        resource: IResource,
        requestFactory: Any = None,
        *,
        reactor: IReactorTime,
        bounds: HttpBounds | None = None,
        connections: Limit | None = None,
        exempt: TrustedProxies | None = None,
        takes_crowded: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        Site.__init__(self, resource, requestFactory, reactor=reactor)
        self.bounds = bounds or HttpBounds()
        self.connections = connections or Limit(0, "connections from one address")
        self.exempt, self.takes_crowded = exempt, takes_crowded
        self.abandoned = DecayingLimit(reactor, MAX_ABANDONED, ABANDONED_PER_SECOND)

    def acceptableProtocols(self) -> list[bytes]:
        """Returns the protocols for ALPN."""
        return [b"http/1.1"]
