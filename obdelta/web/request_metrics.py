"""Metrics of requests and connections, and the ``/metrics`` page for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Callable

from obdelta.net.http_server import BoundedSite
from obdelta.observability import Metrics
from obdelta.web.devices.app import TimedRequest
from obdelta.web.devices.v2 import DOWNLOAD_PATH
from obdelta.web.operators.routes import Answer, Call, Routes, Whole

_EXACT = frozenset({"/api/v2/delta", "/api/v3/delta", DOWNLOAD_PATH, "/healthz", "/v2/"})
_REGISTRY = re.compile(r"/v2/.+/(manifests|blobs|tags|referrers)/[^/]+", re.ASCII)
_REST = {"manifests": "{reference}", "blobs": "{digest}", "tags": "list", "referrers": "{digest}"}
NO_ROUTE = "none"


def device_route(path: str) -> str:
    """Returns the route pattern of a path on the devices' endpoint, from a small fixed set."""
    if path in _EXACT:
        return path
    match = _REGISTRY.fullmatch(path)
    return f"/v2/{{name}}/{match[1]}/{_REST[match[1]]}" if match else NO_ROUTE


def measured(metrics: Metrics, endpoint: str) -> Callable[[TimedRequest], None]:
    """Returns a function for the ``ended`` parameter of ``make_site``. ``endpoint`` is ``devices``
    or ``operators``.
    """

    def ended(request: TimedRequest) -> None:
        route = (
            request.route or device_route(request.path.decode("latin-1"))
            if endpoint == "devices"
            else request.route
        )
        seconds = request.clock.seconds() - request.came
        metrics.request_ended(
            endpoint, route or NO_ROUTE, request.code, seconds, request.sentLength
        )

    return ended


def measure_connections(metrics: Metrics, endpoint: str, site: BoundedSite) -> None:
    """Exports the number of a site's open connections."""
    metrics.connections.labels(endpoint).set_function(lambda: site.open_connections)


class MetricsPage:
    """Serves ``/metrics``."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/metrics", self.page)

    async def page(self, call: Call) -> Answer:
        """Returns all metrics in a format that Prometheus accepts."""
        accept = (call.request.getHeader(b"accept") or b"").decode("latin-1")
        content_type, body = await self._metrics.text(accept)
        return Whole(body, content_type)
