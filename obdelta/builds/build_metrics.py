"""Metrics of builds and worker processes: outcomes, waiting times, seconds by stage, memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.python.failure import Failure

from obdelta.builds.running_build import RunningBuild
from obdelta.builds.service import DeltaService
from obdelta.builds.verdicts import verdict_of
from obdelta.errors import ObdeltaError
from obdelta.observability import Metrics
from obdelta.store.catalogue.records import DeltaRow, Kind

_WORKERS = (b"obdelta.processes.worker_main", b"obdelta.rsync.recorder")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def reason_of(error: BaseException | None) -> str:
    """Returns an error's class as a label: ``upstream-unavailable``. There are as many labels as
    classes.
    """
    name = type(error).__name__ if isinstance(error, ObdeltaError) else "Unexpected"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def stage_seconds(details: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds by stage from a build's details; those of several layers are added up."""
    found: dict[str, float] = {}
    for seconds in [
        details.get("seconds", {}),
        *(layer.get("seconds", {}) for layer in details.get("layers", [])),
    ]:
        for stage, value in seconds.items():
            found[stage] = found.get(stage, 0.0) + float(value)
    return found


class MeasuredBuilds:
    """Records builds in the metrics, as a watcher of the service."""

    def __init__(self, metrics: Metrics, service: DeltaService) -> None:
        self._metrics = metrics
        metrics.running.set_function(
            lambda: sum(build.started is not None for build in service.running)
        )
        metrics.queued.set_function(lambda: sum(build.started is None for build in service.running))
        metrics.before_reading(self._measure_workers)
        service.watchers.append(self)

    async def _measure_workers(self) -> None:
        count, size = worker_memory()
        self._metrics.workers.set(count)
        self._metrics.worker_memory.set(size)

    def requested(self, kind: Kind, found: str) -> None:
        """Counts the answer."""
        self._metrics.answers.labels(kind, found).inc()

    def changed(self, build: RunningBuild) -> None:
        """Does nothing: there is nothing to measure yet."""

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Records a build's outcome, and the time of each stage."""
        kind = build.pair.kind
        waited = seconds if build.started is None else build.started - build.since
        self._metrics.build_wait.observe(waited)
        if not isinstance(outcome, DeltaRow):
            how = "failed" if verdict_of(outcome.value).fault else "skipped"
            self._metrics.builds.labels(kind, how, reason_of(outcome.value)).inc()
            return
        if build.turn is None and build.rebuild is None:
            self._metrics.builds.labels(kind, "elsewhere", "").inc()
            return
        self._metrics.builds.labels(kind, "ready", "").inc()
        self._metrics.build_seconds.labels(kind).observe(seconds - waited)
        for stage, value in stage_seconds(outcome.details).items():
            self._metrics.stage_seconds.labels(kind, stage).observe(value)


def worker_memory(proc: Path = Path("/proc/self")) -> tuple[int, int]:
    """Returns the number of worker processes, children included, and their resident bytes.

    Source: proc(5): ``task/*/children`` and ``statm``. Processes that end meanwhile are left out.
    """
    found = [
        pid
        for pid in _children(proc)
        if any(name in _read(_of(pid) / "cmdline") for name in _WORKERS)
    ]
    for pid in found:
        found += _children(_of(pid))
    pages = [fields[1] for pid in found if len(fields := _read(_of(pid) / "statm").split()) > 1]
    return len(pages), sum(int(count) for count in pages) * _PAGE


def _of(pid: bytes) -> Path:
    return Path("/proc") / pid.decode("ascii")


def _children(process: Path) -> list[bytes]:
    return [pid for thread in process.glob("task/*/children") for pid in _read(thread).split()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
