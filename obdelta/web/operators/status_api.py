"""``/api/v1/status`` and ``/api/v1/builds``: the contents of the first operator page as JSON, for
programs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet.interfaces import IReactorTime

from obdelta import __version__
from obdelta.builds.device_estimates import FleetEstimate
from obdelta.builds.service import DeltaService
from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.listed_deltas import id_of_failure, id_of_key
from obdelta.store.catalogue.records import FailureRow
from obdelta.store.catalogue.tables.refreshed_rows import NamedImages
from obdelta.web.operators.deltas_api import image_as_json, row_as_json
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.sections.attention import Problem, problems
from obdelta.web.operators.pages.sections.pairs_without_delta import MAX_FAILURES
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.operators.pages.status_page import MAX_FLEETS
from obdelta.web.operators.routes import Answer, Call, Routes, as_json


class StatusApi:
    """Serves ``/api/v1/status``. ``gather`` gathers the figures."""

    def __init__(self, service: DeltaService, gather: Callable[[], Awaitable[StatusData]]) -> None:
        self._service, self._gather = service, gather

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/status", self.status)

    async def status(self, call: Call) -> Answer:
        """Returns health, figures since the beginning, the newest deltas and failures. Sizes in
        bytes, times in seconds UTC.
        """
        known, running = await self._gather(), self._service.running
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
                "attention": [_problem(problem) for problem in problems(known)],
                "devices": known.devices,
                "builds": {"running": len(running) - waiting, "queued": waiting},
                "served": {"deltas": count, "full_bytes": full, "delta_bytes": delta},
                "kept": {
                    "deltas": known.totals.deltas,
                    "usage": dict(known.store),
                    "quota": known.quota,
                },
                "deltas": [row_as_json(row, known.names) for row in known.recent],
                "failures": [_failure(row, known.names) for row in known.failures[:MAX_FAILURES]],
                "fleets": [_fleet(fleet) for fleet in known.fleets[:MAX_FLEETS]],
            }
        )


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "severity": problem.severity,
        "what": problem.what,
        "since": problem.since,
        "remedy": problem.remedy,
    }


def _fleet(fleet: FleetEstimate) -> dict[str, Any]:
    return {
        "repository": fleet.repository,
        "reads": fleet.engine.value,
        "link_bits_per_second": fleet.estimate.link,
        "command_microseconds": fleet.estimate.command,
        "devices": fleet.estimate.devices,
    }


def _failure(row: FailureRow, names: Mapping[Digest, ImageNames]) -> dict[str, Any]:
    return {
        "id": id_of_failure(row),
        "kind": row.kind,
        "form": None if row.form is None else row.form.value,
        "base": image_as_json(row.base_repository, row.base, names),
        "target": image_as_json(row.target_repository, row.target, names),
        "outcome": row.outcome.value,
        "reason": row.reason,
        "advice": advice(row),
        "count": row.count,
        "last": row.last,
    }


class BuildsApi:
    """Serves ``/api/v1/builds``, with what images call themselves."""

    def __init__(self, service: DeltaService, names: NamedImages, clock: IReactorTime) -> None:
        self._service, self._names, self._clock = service, names, clock

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/builds", self.builds)

    async def builds(self, call: Call) -> Answer:
        """Returns queued and running builds, oldest first."""
        now, running = self._clock.seconds(), self._service.running
        images = {
            build: {"base": build.pair.base, "target": build.pair.target} for build in running
        }
        names = await self._names.of(
            [image.manifest.digest for pair in images.values() for image in pair.values()]
        )
        builds = [
            {
                "id": id_of_key(build.pair.key),
                "pair": str(build.pair),
                "state": "running" if build.started is not None else "queued",
                "seconds": round(now - build.since, 3),
                "waiting": build.waiting,
                "progress": dict(build.progress),
                "names": {
                    part: names[image.manifest.digest].as_json()
                    for part, image in images[build].items()
                    if image.manifest.digest in names
                },
            }
            for build in running
        ]
        return as_json({"builds": builds})
