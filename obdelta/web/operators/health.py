"""``/healthz`` and ``/readyz``: whether the process runs, and whether it can do its work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta.concurrency.single_flight import Shared, settle
from obdelta.errors import ObdeltaError, Unavailable
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials, Upstream
from obdelta.registry.upstream import ProxiedRequest
from obdelta.web.operators.routes import Answer, Call, Routes, as_json, text

Problem = Callable[[], Awaitable[str | None]]
"""Why something does not work right now, one line; None when it does. An ObdeltaError says the
same.
"""
PATIENCE = 5.0
"""Seconds that a check may take; probes wait ten at most, as a rule."""
FRESH = 5.0
"""Seconds that what was found is good for: any number of probes costs the upstream one request in
that time.
"""


@dataclass(slots=True)
class _Check:
    problem: Problem
    good_for: float
    found: str | None = None
    until: float = float("-inf")


class Readiness:
    """A list of checks; whoever keeps something that may fail adds one. ``notes`` are lines for
    what is less than it should be and keeps this server from nothing; empty ones say nothing.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._checks: dict[str, _Check] = {}
        self._asking: Shared[str, None] = Shared()
        self.notes: list[Callable[[], str]] = []

    def add(self, name: str, problem: Problem, *, good_for: float = FRESH) -> None:
        """A check by its name (one word). That all is well is believed for ``good_for`` seconds, a
        problem for ``FRESH``.
        """
        self._checks[name] = _Check(problem, good_for)

    async def problems(self) -> dict[str, str | None]:
        """Every check by its name, and what is wrong."""
        await settle(self._refresh(name, check) for name, check in self._checks.items())
        return {name: check.found for name, check in self._checks.items()}

    async def _refresh(self, name: str, check: _Check) -> None:
        if self._clock.seconds() >= check.until:
            await self._asking.do(name, lambda: self._ask(check))

    async def _ask(self, check: _Check) -> None:
        asked: Deferred[str | None] = ensureDeferred(_line(check.problem))
        check.found = await asked.addTimeout(PATIENCE, self._clock, onTimeoutCancel=_too_slow)
        check.until = self._clock.seconds() + (check.good_for if check.found is None else FRESH)

    def told_notes(self) -> list[str]:
        """Returns the notes that have something to say."""
        return [told for note in self.notes if (told := note())]

    def add_to(self, routes: Routes) -> None:
        """Its routes."""
        routes.add("GET", "/healthz", self.alive)
        routes.add("GET", "/readyz", self.ready)

    async def alive(self, call: Call) -> Answer:
        """The process runs, and its reactor turns."""
        return as_json({"alive": True}) if call.accepts_json() else text("ok")

    async def ready(self, call: Call) -> Answer:
        """Whether this server can do its work: 200, or 503 and what is wrong."""
        found = await self.problems()
        wrong = {name: problem for name, problem in found.items() if problem is not None}
        notes = self.told_notes()
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
    """Asks for ``/v2/``, without credentials: any answer but 5xx shows that the registry is there."""

    async def ask() -> str | None:
        answer = await upstream.relay(
            ProxiedRequest(b"GET", "/v2/", Headers(), Credentials.anonymous())
        )
        answer.cancel()
        return f"the upstream registry answers {answer.status}" if answer.status >= 500 else None

    return ask


WORKERS_GOOD_FOR = 60.0
"""Seconds: to start a worker costs a tenth of a processor second or more."""


def workers_problem(pool: WorkerPool) -> Problem:
    """A worker that is alive shows that workers can be started; else one is, and answers."""

    async def ask() -> str | None:
        if not pool.pids:
            try:
                await pool.run({"task": "ping"}, seconds=PATIENCE)
            except Unavailable as error:
                return str(error)
        return None

    return ask
