"""``/healthz``, ``/readyz`` and ``/metrics``: whether the process runs, whether it can do its work,
and its figures for Prometheus.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta.concurrency.tasks import SingleFlight, settle
from obdelta.errors import ObdeltaError, Unavailable
from obdelta.observability import Metrics
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials, Upstream
from obdelta.registry.upstream import ProxiedRequest
from obdelta.web.operators.routes import Answer, Call, Routes, Whole, as_json, text

Problem = Callable[[], Awaitable[str | None]]
"""Returns one line that describes a current problem, or None. Raising ObdeltaError means the same
as a line.
"""
CHECK_TIMEOUT = 5.0
"""Maximum seconds for a check; probes usually wait ten at most."""
CACHE_SECONDS = 5.0
"""Seconds that a result is cached. In that time any number of probes costs the upstream one
request. Callers that display problems accept less.
"""


@dataclass(slots=True)
class _Check:
    problem: Problem
    cache_seconds: float
    found: str | None = None
    since: float | None = None
    """When the present problem was found first, by the reactor's clock."""
    checked: float = float("-inf")
    """When it was made last, by the reactor's clock."""

    def lasts(self, max_age: float) -> float:
        """Returns the seconds for which its result counts. A check that costs much is not repeated
        sooner because a caller wants so.
        """
        if self.cache_seconds > CACHE_SECONDS:
            return self.cache_seconds if self.found is None else CACHE_SECONDS
        return max_age


class Readiness:
    """A list of checks and notes. Components add a check for each dependency that may fail.

    ``notes`` return lines about limitations that do not stop this server from working, or empty
    strings. So do ``warnings``, about parts that fail: each of these lines is a note, too.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._checks: dict[str, _Check] = {}
        self._under_way: SingleFlight[str, None] = SingleFlight()
        self.notes: list[Callable[[], str]] = []
        self.warnings: list[Callable[[], str]] = []
        self._warned: dict[str, float] = {}
        """When each present warning was found first, by the reactor's clock."""

    def add(self, name: str, problem: Problem, *, cache_seconds: float = CACHE_SECONDS) -> None:
        """Adds a check under a one-word name. A good result is cached for ``cache_seconds``
        seconds, a problem for ``CACHE_SECONDS``; a check of more than that costs much.
        """
        self._checks[name] = _Check(problem, cache_seconds)

    async def problems(self, max_age: float = CACHE_SECONDS) -> dict[str, str | None]:
        """Returns the problem of each check by its name, None if there is none. Results are at most
        ``max_age`` seconds old, except those of costly checks.
        """
        await settle(self._refresh(name, check, max_age) for name, check in self._checks.items())
        return {name: check.found for name, check in self._checks.items()}

    def ages(self) -> dict[str, float]:
        """Returns the seconds since each present problem was found first."""
        now = self._clock.seconds()
        return {
            name: now - check.since
            for name, check in self._checks.items()
            if check.since is not None
        }

    async def _refresh(self, name: str, check: _Check, max_age: float) -> None:
        if self._clock.seconds() - check.checked >= check.lasts(max_age):
            await self._under_way.do(name, lambda: self._run(check))

    async def _run(self, check: _Check) -> None:
        result: Deferred[str | None] = ensureDeferred(_line(check.problem))
        check.found = await result.addTimeout(CHECK_TIMEOUT, self._clock, onTimeoutCancel=_too_slow)
        now = self._clock.seconds()
        check.since = None if check.found is None else now if check.since is None else check.since
        check.checked = now

    def current_notes(self) -> list[str]:
        """Returns the notes that are not empty."""
        return [line for note in self.notes if (line := note())]

    def current_warnings(self) -> dict[str, float]:
        """Returns the present warnings, with the seconds since each was found first."""
        now = self._clock.seconds()
        lines = [line for warning in self.warnings if (line := warning())]
        self._warned = {line: self._warned.get(line, now) for line in lines}
        return {line: now - since for line, since in self._warned.items()}

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/healthz", self.alive)
        routes.add("GET", "/readyz", self.ready)

    async def alive(self, call: Call) -> Answer:
        """Answers that the process runs and its reactor turns."""
        return as_json({"alive": True}) if call.accepts_json() else text("ok")

    async def ready(self, call: Call) -> Answer:
        """Answers 200 if this server can do its work, else 503 with the problems."""
        found = await self.problems()
        wrong = {name: problem for name, problem in found.items() if problem is not None}
        notes = self.current_notes()
        status = 503 if wrong else 200
        if call.accepts_json():
            checks = {
                name: {"ok": problem is None, "problem": problem} for name, problem in found.items()
            }
            return as_json({"ready": not wrong, "checks": checks, "notes": notes}, status)
        lines = [f"{name}: {problem or 'ok'}" for name, problem in found.items()]
        head = f"not ready: {'; '.join(wrong.values())}" if wrong else "ready"
        return text("\n".join([head, *lines, *notes]), status)


async def _line(problem: Problem) -> str | None:
    try:
        return await problem()
    except ObdeltaError as error:
        return str(error)


def _too_slow(_result: object, seconds: float) -> str:
    return f"no answer within {seconds:g} seconds"


def upstream_problem(upstream: Upstream) -> Problem:
    """Returns a check that requests ``/v2/`` without credentials. Any status but 5xx shows that the
    registry works.
    """

    async def request() -> str | None:
        answer = await upstream.relay(
            ProxiedRequest(b"GET", "/v2/", Headers(), Credentials.anonymous(), impatient=True)
        )
        answer.cancel()
        return f"the upstream registry answers {answer.status}" if answer.status >= 500 else None

    return request


WORKERS_CACHE_SECONDS = 60.0
"""Seconds: starting a worker process costs a tenth of a processor second or more."""


def workers_problem(pool: WorkerPool) -> Problem:
    """Returns a check that worker processes can be started. Without a live one, it starts one and
    pings it.
    """

    async def request() -> str | None:
        if not pool.pids:
            try:
                await pool.run({"task": "ping"}, seconds=CHECK_TIMEOUT)
            except Unavailable as error:
                return str(error)
        return None

    return request


class MetricsPage:
    """Serves ``/metrics`` for Prometheus."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/metrics", self.page)

    async def page(self, call: Call) -> Answer:
        """Returns all metrics in a format that Prometheus accepts."""
        accept = (call.request.getHeader(b"accept") or b"").decode("latin-1")
        content_type, body = await self._metrics.text(accept)
        return Whole(body, content_type)
