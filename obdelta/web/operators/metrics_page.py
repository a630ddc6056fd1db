"""Serves ``/metrics`` for Prometheus."""

from __future__ import annotations

from obdelta.observability import Metrics
from obdelta.web.operators.routes import Answer, Call, Routes, Whole


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
