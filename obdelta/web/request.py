"""Requests of devices and operators: their IDs, log lines and small responses, and the HTTP sites
(Twisted's ``Site``) that receive them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime, ITCPTransport
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request as HttpRequest
from twisted.web.resource import IResource
from twisted.web.server import Request

from obdelta.concurrency.limits import Limit
from obdelta.concurrency.tasks import Waiters
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.http_limits import HttpBounds, phrase_of
from obdelta.net.http_server import BoundedSite
from obdelta.observability import Metrics
from obdelta.observability.logging import (
    REQUEST_ID_HEADER,
    accepted_request_id,
    new_request_id,
    within_request,
)

log = Logger(namespace="obdelta.web.devices.app")
"""The lines of requests are in the log area of their errors (`docs/operators.md`)."""


def id_of(request: object) -> str:
    """Returns the ID of a request, or "" if it has none."""
    return request.request_id if isinstance(request, IdentifiedRequest) else ""


def with_id(message: str, request: object) -> str:
    """Returns a line for an error's body that ends with the request ID, for a search in the log."""
    request_id = id_of(request)
    return f"{message} (request {request_id})\n" if request_id else f"{message}\n"


def respond(request: Request, status: int, content_type: bytes, body: bytes) -> None:
    """Sends a small, complete response and ends the request."""
    request.setResponseCode(status, phrase_of(status))
    request.setHeader(b"content-type", content_type)
    request.setHeader(b"content-length", str(len(body)).encode("ascii"))
    request.write(body)
    request.finish()


def abort(request: HttpRequest) -> None:
    """Cuts the connection, so that an incomplete body does not look complete."""
    channel = request.channel
    if channel is not None and channel.transport is not None:
        cast(ITCPTransport, channel.transport).abortConnection()


class IdentifiedRequest(Request):
    """A request with an ID, which is passed on to everything that is done for it: log lines,
    builds, jobs of workers, upstream requests.

    A trusted proxy may set the ID (``X-Request-Id``). The response carries it in the same header.
    """

    request_id = ""
    crowded = False
    """Whether the connection is above the limit of its address. The application must then refuse
    the request.
    """

    def process(self) -> None:
        """Sets the ID, then processes the request in its context."""
        sent = accepted_request_id(self.getHeader(REQUEST_ID_HEADER)) if self.may_set_id() else None
        self.request_id = sent or new_request_id()
        self.responseHeaders.setRawHeaders(REQUEST_ID_HEADER, [self.request_id.encode("ascii")])
        within_request(self.request_id, super().process)

    def may_set_id(self) -> bool:
        """Returns whether the sender is trusted to set the request ID."""
        return True


class TimedRequest(IdentifiedRequest):
    """A request that records its arrival time and logs one line when it ends."""

    started: float = 0.0
    complete = False
    """Whether the whole request has arrived."""
    end = ""
    """How it ended: ``done``, or ``cut`` by the client or by this server."""
    route: str | None = None
    """The pattern that the path matched, if a table of routes served it."""
    clock: IReactorTime
    clients: ForwardedClients
    ended: Callable[[TimedRequest], None] | None

    def process(self) -> None:
        self.started, self.complete = self.clock.seconds(), True
        super().process()

    def may_set_id(self) -> bool:
        """Returns True only for a proxy: a device could make another's log lines look
        like its own.
        """
        return self.clients.comes_from_proxy(self)

    def finish(self) -> None:
        self.end = "done"
        super().finish()  # type: ignore[no-untyped-call] # Twisted's
        self._log_line()

    def connectionLost(self, reason: Failure) -> None:
        self.end = "cut"
        super().connectionLost(reason)  # type: ignore[no-untyped-call] # Twisted's
        if self.complete:
            self._log_line()

    def _log_line(self) -> None:
        # The path without its query, which may hold a signature.
        log.info(
            "request: peer={peer} method={method} path={path} status={status} bytes={bytes}"
            " seconds={seconds} end={how}",
            peer=self.clients.address(self) or "-",
            method=self.method.decode("latin-1"),
            path=ascii(self.path.decode("latin-1"))[1:-1][:300],
            status=self.code,
            bytes=self.sentLength,
            seconds=round(self.clock.seconds() - self.started, 3),
            how=self.end,
            request=self.request_id,
        )
        if self.ended is not None:
            self.ended(self)


def make_site(
    resource: IResource,
    clock: IReactorTime,
    *,
    clients: ForwardedClients,
    connections: Limit | None = None,
    exempt: TrustedProxies | None = None,
    ended: Callable[[TimedRequest], None] | None = None,
    bounds: HttpBounds | None = None,
) -> BoundedSite:
    """Returns the factory for one endpoint. Its requests log themselves, so Twisted's access log
    (whole URLs) is off.

    ``ended`` is called once with every request when it has ended.
    """

    class LoggingRequest(TimedRequest):
        pass

    LoggingRequest.clock, LoggingRequest.clients = clock, clients
    LoggingRequest.ended = staticmethod(ended) if ended is not None else None
    return QuietSite(
        resource,
        requestFactory=LoggingRequest,
        reactor=clock,
        bounds=bounds,
        connections=connections,
        exempt=exempt,
        takes_crowded=_is_api,
    )


def _is_api(path: bytes) -> bool:
    """Returns whether a request must not be answered with 429, which would make a supervisor pull
    in full.
    """
    return path.startswith(b"/api/")


class QuietSite(BoundedSite):
    """A site without Twisted's access log, which writes whole URLs."""

    def log(self, request: object) -> None:
        """Writes nothing: TimedRequest logs its own line."""


class InFlight:
    """Counts requests until they end, successfully or not."""

    def __init__(self) -> None:
        self.count = 0
        self._drained: Waiters[None] = Waiters()

    def add(self, request: Request) -> None:
        """Counts a request until its response is sent or its client disconnects."""
        self.count += 1
        request.notifyFinish().addBoth(self._ended)

    def _ended(self, _outcome: object) -> None:
        self.count -= 1
        if not self.count:
            self._drained.fire(None)

    async def drained(self, seconds: float, clock: IReactorTime) -> bool:
        """Waits up to ``seconds`` until no request is in flight. Returns whether none is left."""
        if self.count and seconds > 0:
            try:
                await self._drained.wait().addTimeout(seconds, clock)
            except TimeoutError:
                return False
        return not self.count


NO_ROUTE = "none"
"""The route of a request that matches none, in metrics."""


def measured(
    metrics: Metrics, endpoint: str, route_of: Callable[[str], str] | None = None
) -> Callable[[TimedRequest], None]:
    """Returns a function for the ``ended`` parameter of :func:`make_site`. ``endpoint`` is
    ``devices`` or ``operators``.

    ``route_of`` gives the route of a path that no table of routes served.
    """

    def ended(request: TimedRequest) -> None:
        route = request.route
        if route is None and route_of is not None:
            route = route_of(request.path.decode("latin-1"))
        seconds = request.clock.seconds() - request.started
        metrics.request_ended(
            endpoint, route or NO_ROUTE, request.code, seconds, request.sentLength
        )

    return ended


def measure_connections(metrics: Metrics, endpoint: str, site: BoundedSite) -> None:
    """Exports the number of a site's open connections."""
    metrics.connections.labels(endpoint).set_function(lambda: site.open_connections)
