"""Summaries of fleets for operators: their devices, engines, versions and savings.

Everything here runs in the database's thread, and reads every row.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from obdelta.oci import Digest
from obdelta.store.fleets import Fleets

MAX_VERSIONS = 5
"""Versions of a fleet that are named: those from which devices updated last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSummary:
    """One fleet, named after the repository that its devices requested last.

    ``devices`` counts those with measured downloads, by the best form that their engine reads.
    ``versions``: base repositories of updates with the time of the last request, the latest first.
    ``images``: the image of each of these repositories that was requested last, where a delta is
    kept. ``saved``: bytes that devices did not pull so far. Times in seconds UTC.
    """

    repository: str
    devices: Mapping[str, int]
    versions: tuple[tuple[str, int], ...]
    more_versions: int
    images: Mapping[str, Digest]
    deltas: int
    served: int
    saved: int
    last: int


@dataclass(slots=True)
class _Fleet:
    targets: dict[str, int] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    devices: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    deltas: int = 0
    served: int = 0
    saved: int = 0

    def update(self, base: str, target: str, last: int) -> None:
        self.targets[target] = max(last, self.targets.get(target, 0))
        if base != target:
            self.bases[base] = max(last, self.bases.get(base, 0))


def summaries(connection: sqlite3.Connection) -> list[FleetSummary]:
    """Returns all fleets, the one with the latest request first."""
    kept = connection.execute(
        "SELECT publications.base_repository, publications.target_repository, last_served, base,"
        " target FROM publications JOIN deltas ON delta = id ORDER BY delta,"
        " publications.target_repository, publications.base_repository"
    ).fetchall()
    published = [row[:3] for row in kept]
    images = {
        repository: Digest(image)
        for base, target, _, *pair in sorted(kept, key=lambda row: row[2])
        for repository, image in zip((base, target), pair, strict=True)
    }
    requested = connection.execute(
        "SELECT base_repository, target_repository, last FROM asked ORDER BY last"
    ).fetchall()
    fleets = Fleets(limit=2 * (len(published) + len(requested)) + 1)
    for base, target, _ in published + requested:
        fleets.of(base, target)
    found: dict[str, _Fleet] = defaultdict(_Fleet)
    for base, target, last in published + requested:
        found[fleets.fleet(target)].update(base, target, last)
    # A delta counts for the repositories that it was built for.
    for target, served, full, size in connection.execute(
        "SELECT target_repository, served, full_bytes, delta_bytes FROM deltas"
    ):
        fleet = found[fleets.fleet(target)]
        fleet.deltas += 1
        fleet.served += served
        fleet.saved += served * max(0, full - size)
    for device, target, engine in connection.execute(
        "SELECT DISTINCT device, target_repository, engine FROM device_downloads"
    ):
        found[fleets.fleet(target)].devices[engine].add(device)
    return sorted(
        (_summary(fleet, images) for fleet in found.values() if fleet.targets), key=_latest
    )


def _latest(summary: FleetSummary) -> tuple[int, str]:
    return -summary.last, summary.repository


def _summary(fleet: _Fleet, images: Mapping[str, Digest]) -> FleetSummary:
    versions = sorted(fleet.bases.items(), key=lambda version: (-version[1], version[0]))
    newest, last = max(fleet.targets.items(), key=lambda target: (target[1], target[0]))
    shown = versions[:MAX_VERSIONS]
    return FleetSummary(
        repository=newest,
        devices={engine: len(devices) for engine, devices in sorted(fleet.devices.items())},
        versions=tuple(shown),
        more_versions=max(0, len(versions) - MAX_VERSIONS),
        images={name: images[name] for name in (newest, *dict(shown)) if name in images},
        deltas=fleet.deltas,
        served=fleet.served,
        saved=fleet.saved,
        last=last,
    )
