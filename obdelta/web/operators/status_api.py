"""``/api/v1/status``: the contents of the first operator page as JSON, for programs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from obdelta import __version__
from obdelta.builds.service import DeltaService
from obdelta.store.catalogue.records import FailureRow
from obdelta.web.operators.deltas_api import row_as_json
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.status_page import Known
from obdelta.web.operators.routes import Answer, Call, Routes, as_json


class StatusApi:
    """Serves ``/api/v1/status``. ``know`` gathers the figures."""

    def __init__(self, coordinator: DeltaService, know: Callable[[], Awaitable[Known]]) -> None:
        self._coordinator, self._know = coordinator, know

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/status", self.status)

    async def status(self, call: Call) -> Answer:
        """Returns health, figures since the beginning, the newest deltas and failures. Sizes in
        bytes, times in seconds UTC.
        """
        known, running = await self._know(), self._coordinator.running
        waiting = sum(build.started is None for build in running)
        full, delta, count = (
            sum(known.counters.get(f"served.{kind}.{what}", 0) for kind in ("v2", "v3"))
            for what in ("full_bytes", "delta_bytes", "deltas")
        )
        return as_json(
            {
                "version": __version__,
                "now": known.now,
                "problems": {part: why for part, why in known.problems.items() if why is not None},
                "notes": list(known.notes),
                "devices": known.devices,
                "builds": {"running": len(running) - waiting, "queued": waiting},
                "served": {"deltas": count, "full_bytes": full, "delta_bytes": delta},
                "kept": {
                    "deltas": known.totals.deltas,
                    "usage": dict(known.store),
                    "quota": known.quota,
                },
                "deltas": [row_as_json(row) for row in known.recent],
                "failures": [_failure(row) for row in known.failures],
            }
        )


def _failure(row: FailureRow) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "base": {"repository": row.base_repository, "digest": str(row.base)},
        "target": {"repository": row.target_repository, "digest": str(row.target)},
        "outcome": row.outcome.value,
        "reason": row.reason,
        "advice": advice(row),
        "count": row.count,
        "last": row.last,
    }
