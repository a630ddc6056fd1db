"""The data of the first page, gathered at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from obdelta.builds.device_estimates import FleetEstimate
from obdelta.concurrency.watched_file import FileProblem
from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.records import DeltaRow, FailureRow, Totals
from obdelta.store.catalogue.tables.counters import Served
from obdelta.web.request_traces import RefusedClient


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusData:
    """The data of the first page at ``now`` (seconds UTC). ``clock`` is the same moment on the
    clock that measures builds.

    ``store`` maps kinds to bytes. ``problems`` maps parts to the reason why they are not ready.
    ``ages``: the seconds since each of these problems was found. ``warnings``: parts that fail
    while the server works, each with the seconds since that was found. ``notes`` are further
    lines for operators. ``fleets`` are those whose devices were measured. ``certificates``:
    when each file expires. ``unusable_files``: those that have changed, and cannot be used.
    ``refused``: clients whose requests were refused. ``names``: the names of images, by the
    digests of their manifests. ``fleet_problem``: why openBalena's API cannot be read, and
    since when (seconds UTC). ``served`` and ``served_daily``: totals of the last hours and
    days.
    """

    now: float
    clock: float
    devices: int
    totals: Totals
    counters: Mapping[str, int]
    served: Sequence[Served]
    served_daily: Sequence[Served]
    recent: Sequence[DeltaRow]
    failures: Sequence[FailureRow]
    store: Mapping[str, int]
    quota: int
    problems: Mapping[str, str | None]
    notes: Sequence[str] = ()
    fleets: Sequence[FleetEstimate] = ()
    ages: Mapping[str, float] = field(default_factory=dict)
    warnings: Mapping[str, float] = field(default_factory=dict)
    certificates: Mapping[str, float] = field(default_factory=dict)
    unusable_files: Sequence[FileProblem] = ()
    refused: Sequence[RefusedClient] = ()
    names: Mapping[Digest, ImageNames] = field(default_factory=dict)
    fleet_problem: str | None = None
    fleet_problem_since: float = 0.0
