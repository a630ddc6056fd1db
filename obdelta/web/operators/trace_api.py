"""``/api/v1/trace``: the last requests of a device, and the clients that were refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json
from obdelta.web.request_traces import RefusedClient, RequestTraces

MAX_SHOWN = 100
"""Requests in one answer."""


class TraceApi:
    """Serves what is known of devices' requests (`docs/operators.md`)."""

    def __init__(self, traces: RequestTraces) -> None:
        self._traces = traces

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/trace", self.refused)
        routes.add("GET", "/api/v1/trace/{id...}", self.trace)

    async def refused(self, call: Call) -> Answer:
        """Returns the clients whose requests were refused, the last refused first."""
        return as_json(
            {"refused": [refused_as_json(one) for one in self._traces.refused_clients()]}
        )

    async def trace(self, call: Call) -> Answer:
        """Returns the last requests by request ID, by a device's UUID or subject, or by address.
        Raises NotFound.
        """
        name = call.parameters["id"]
        found = self._traces.find(name)
        if not found:
            raise NotFound(f"no request of {ascii(name)[1:-1]} is remembered")
        return as_json({"requests": [asdict(trace) for trace in found[:MAX_SHOWN]]})


def refused_as_json(client: RefusedClient) -> dict[str, Any]:
    """Returns a refused client: its subject or address, the number of refusals, and the last."""
    return {
        "client": client.last.client,
        "count": client.count,
        "first": client.first,
        "last": asdict(client.last),
    }
