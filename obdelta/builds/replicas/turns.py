"""Turns: which replica builds a pair, agreed through Redis (setting ``shared``).

A delta that a replica has built goes into the registry. The others then receive a report, and find
the delta there. While one builds, the others' devices wait for it without using their build queues.
Redis decides nothing about correctness: each builder proves its delta, and a delta is known by its
contents, so that at worst a pair is built twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.replicas import outcomes
from obdelta.builds.replicas.leases import MAX_ATTEMPTS, Done, Held, Lease, Leases
from obdelta.builds.types import Pair, Ready, Turn
from obdelta.builds.verdicts import FailedElsewhere, verdict_of
from obdelta.errors import ObdeltaError, SharedUnavailable, WorkerFailed
from obdelta.oci import Form
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind, Outcome

log = Logger()

ROW_SECONDS = 7 * 86400.0
"""Seconds for which a finished delta is reported to others; the registry has it longer, and is
queried first.
"""
VERDICT_SECONDS = 86400.0
"""Seconds for which a verdict on the contents is reported to others."""
MAX_WAIT = 300.0
"""Total seconds for which a build waits for other replicas; then it is built here, whatever Redis
reports.
"""


class Registered(Protocol):
    """The registry, in which replicas find each other's deltas."""

    async def find(self, pair: Pair) -> object | None:
        """Returns the pair's delta if the registry has it; never raises an ObdeltaError."""

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> object | None:
        """Pushes the delta and returns it when the push has ended; None if the push failed."""


class SharedTurns:
    """Turns by leases in Redis. ``registries`` has the registry for each kind of delta that is
    shared. ``count`` increments a counter.
    """

    def __init__(
        self,
        leases: Leases,
        registries: Mapping[Kind, Registered],
        clock: IReactorTime,
        count: Callable[[str], Awaitable[None]],
        *,
        failure_memory: float,
        push_seconds: float,
    ) -> None:
        self._leases, self._registries, self._clock, self._count = leases, registries, clock, count
        self._failure_memory, self._push_seconds = failure_memory, push_seconds
        self._ending: set[Deferred[None]] = set()

    async def turn(self, pair: Pair, waited: float) -> Turn | DeltaRow | None:
        """See :meth:`obdelta.builds.types.Replicas.turn`. Ours without a lease while Redis is
        unavailable, or after too long a wait.
        """
        if pair.kind not in self._registries:
            return Turn(pair)
        try:
            for _ in range(MAX_ATTEMPTS):
                try:
                    found = await self._leases.take(name_of(pair))
                except Held:
                    if waited < MAX_WAIT:
                        return None
                    log.warn(
                        "another replica takes too long to build {pair}: it is built here too",
                        pair=str(pair),
                    )
                    break
                if isinstance(found, Lease):
                    return Turn(pair, found)
                row = await self._valid_row(pair, found)
                if row is not None:
                    return row
        except SharedUnavailable as error:
            log.debug(
                "{pair} is built without the other replicas: {reason}",
                pair=str(pair),
                reason=str(error),
            )
        await self._count("shared.alone")
        return Turn(pair)

    async def _valid_row(self, pair: Pair, done: Done) -> DeltaRow | None:
        """Returns another replica's delta if it is valid; forgets the report otherwise. Raises
        FailedElsewhere.
        """
        outcome = outcomes.read(done.text, pair.key)
        if isinstance(outcome, DeltaRow):
            found = await self._registries[pair.kind].find(pair)
            if found is not None:
                await self._count("shared.found")
                # The registry knows more of a batch than Redis.
                return found.delta if isinstance(found, Ready) else outcome
        if isinstance(outcome, tuple) and done.seconds <= VERDICT_SECONDS:
            await self._count("shared.refused")
            raise FailedElsewhere(*outcome)
        # The registry has lost it, it was written in another format, or no replica wrote it.
        await self._leases.forget(name_of(pair), done)
        return None

    async def wait(self, pair: Pair, waited: float) -> None:
        """See :meth:`Replicas.wait`."""
        log.info("another replica builds {pair}", pair=str(pair))
        await self._count("shared.waited")
        await self._leases.wait_until_free(name_of(pair), max(0.0, MAX_WAIT - waited))

    async def forget(self, pair: Pair) -> None:
        """See :meth:`Replicas.forget`. Does nothing if a build is under way, or if Redis is
        unavailable.
        """
        if pair.kind not in self._registries:
            return
        try:
            found = await self._leases.take(name_of(pair))
        except (Held, SharedUnavailable):
            return
        if isinstance(found, Lease):
            await self._leases.release(found)
        else:
            await self._leases.forget(name_of(pair), found)

    def report_end(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """See :meth:`obdelta.builds.types.Replicas.report_end`. The lease lasts until the delta is
        in the registry.
        """
        if turn.lease is not None:
            ending = ensureDeferred(self._end(turn.pair, turn.lease, outcome))
            self._ending.add(ending)
            ending.addBoth(lambda _: self._ending.discard(ending))

    async def _end(self, pair: Pair, lease: Lease, outcome: DeltaRow | Failure) -> None:
        try:
            await self._report(pair, lease, outcome)
        except (ObdeltaError, CancelledError) as error:
            log.warn(
                "the result of {pair} was not reported to other replicas: {reason}",
                pair=str(pair),
                reason=str(error),
            )
        finally:
            await self._leases.release(lease)

    async def _report(self, pair: Pair, lease: Lease, outcome: DeltaRow | Failure) -> None:
        if isinstance(outcome, DeltaRow):
            deadline = self._clock.seconds() + self._push_seconds
            pushed = pair.in_form(outcome.key.form)
            if await self._registries[pair.kind].publish(pushed, outcome, deadline) is None:
                return  # the other replicas cannot reach it
            text, seconds = outcomes.text_of_row(outcome), ROW_SECONDS
        else:
            verdict = _verdict(outcome.value, self._failure_memory)
            if verdict is None:
                return
            text, seconds = outcomes.text_of_verdict(verdict[0], str(outcome.value)), verdict[1]
        recorded = await self._leases.finish(lease, text, seconds)
        await self._count("shared.told" if recorded else "shared.overtaken")

    async def close(self) -> None:
        """Releases every turn; pushes must have ended, or are cancelled."""
        for ending in list(self._ending):
            ending.cancel()
            await ending


def _verdict(error: BaseException | None, failure_memory: float) -> tuple[Outcome, float] | None:
    """Returns what a failure means for all replicas, and for how many seconds; None: nothing."""
    outcome = verdict_of(error).outcome
    if outcome is None or outcome is not Outcome.ERROR:
        return None if outcome is None else (outcome, VERDICT_SECONDS)
    # It has had its second attempt.
    return (Outcome.ERROR, failure_memory) if isinstance(error, WorkerFailed) else None


def name_of(pair: Pair) -> str:
    """Returns the name of the work: both contents, the recipe, and the repositories in which
    devices find the delta.
    """
    return name_of_key(pair.key, pair.base.repository, pair.target.repository)


def name_of_key(key: DeltaKey, base_repository: str, target_repository: str) -> str:
    """Returns the same name from its parts."""
    text = f"{key.kind} {key.recipe} {key.base} {key.target} {base_repository} {target_repository}"
    if key.form is not Form.UNIVERSAL:
        text += f" {key.form.value}"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
