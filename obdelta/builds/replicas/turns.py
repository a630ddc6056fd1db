"""Whose turn a build is, where several replicas may do it: through Redis (setting ``shared``), or
always ours.

A v3 delta that a replica has built goes into the registry; then the others are told, and find it
there. While one builds, the others' devices wait for it and take no place in their own queues.
Redis decides nothing about what is right: a delta is proven by whoever builds it and known by its
contents, so that at worst a pair is built twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.replicas import outcomes
from obdelta.builds.replicas.leases import TRIES, Done, Held, Lease, Leases
from obdelta.builds.types import Pair
from obdelta.builds.verdicts import FailedElsewhere, verdict_of
from obdelta.errors import ObdeltaError, SharedUnavailable, WorkerFailed
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Outcome

log = Logger()

ROW_SECONDS = 7 * 86400.0
"""Seconds for which others are told of a finished delta; the registry has it longer, and is asked
first.
"""
VERDICT_SECONDS = 86400.0
"""The same of a verdict on the contents."""
LONGEST_WAIT = 300.0
"""Seconds for which a build waits for other replicas, in all; then it is built here, whatever Redis
says.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """It is ours to build. ``lease`` is None where nobody else is asked."""

    pair: Pair
    lease: Lease | None = None


class Replicas(Protocol):
    """What the coordinator needs of them."""

    async def turn(self, pair: Pair, waited: float) -> Turn | DeltaRow | None:
        """A turn, which :meth:`over` must end; a delta that another replica has made; None: one is
        at it. ``waited``: the seconds that this build has waited for others. Raises
        FailedElsewhere.
        """

    async def wait(self, pair: Pair, waited: float) -> None:
        """Until the replica that is at it has ended, is believed to be dead, or takes too long."""

    def over(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """How it ended. Waits for nothing."""

    async def close(self) -> None:
        """Gives back every turn."""


class Alone:
    """There are no others."""

    async def turn(self, pair: Pair, waited: float) -> Turn:
        """Always ours."""
        return Turn(pair)

    async def wait(self, pair: Pair, waited: float) -> None:
        """There is nobody to wait for."""

    def over(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """There is nobody to tell."""

    async def close(self) -> None:
        """There is nothing to give back."""


class Registered(Protocol):
    """The registry as the place where replicas find each other's deltas."""

    async def find(self, pair: Pair) -> object | None:
        """Whether the registry has the pair's delta; never raises an ObdeltaError."""

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> object | None:
        """Pushes it, and waits for that; None: it could not be."""


class SharedTurns:
    """Turns by leases in Redis, for v3; a v2 batch is each replica's own. ``count`` raises a tally."""

    def __init__(
        self,
        leases: Leases,
        registry: Registered,
        clock: IReactorTime,
        count: Callable[[str], Awaitable[None]],
        *,
        failure_memory: float,
        push_seconds: float,
    ) -> None:
        self._leases, self._registry, self._clock, self._count = leases, registry, clock, count
        self._failure_memory, self._push_seconds = failure_memory, push_seconds
        self._ending: set[Deferred[None]] = set()

    async def turn(self, pair: Pair, waited: float) -> Turn | DeltaRow | None:
        """As the protocol says; ours without a lease while Redis is away, or after too long a wait."""
        if pair.kind != "v3":
            return Turn(pair)
        try:
            for _ in range(TRIES):
                try:
                    found = await self._leases.take(name_of(pair))
                except Held:
                    if waited < LONGEST_WAIT:
                        return None
                    log.warn("{pair} was waited for too long, it is built here too", pair=str(pair))
                    break
                if isinstance(found, Lease):
                    return Turn(pair, found)
                row = await self._believed(pair, found)
                if row is not None:
                    return row
        except SharedUnavailable as error:
            log.debug(
                "{pair} is built without asking others: {reason}", pair=str(pair), reason=str(error)
            )
        await self._count("shared.alone")
        return Turn(pair)

    async def _believed(self, pair: Pair, done: Done) -> DeltaRow | None:
        """What others found, as far as it can be believed; forgotten otherwise. Raises
        FailedElsewhere.
        """
        outcome = outcomes.read(done.text, pair.key)
        if isinstance(outcome, DeltaRow) and await self._registry.find(pair) is not None:
            await self._count("shared.found")
            return outcome
        if isinstance(outcome, tuple) and done.seconds <= VERDICT_SECONDS:
            await self._count("shared.refused")
            raise FailedElsewhere(*outcome)
        # The registry has lost it, it was written in another format, or no replica wrote it.
        await self._leases.forget(name_of(pair), done)
        return None

    async def wait(self, pair: Pair, waited: float) -> None:
        """As the protocol says."""
        log.info("another replica builds {pair}", pair=str(pair))
        await self._count("shared.waited")
        await self._leases.over(name_of(pair), max(0.0, LONGEST_WAIT - waited))

    def over(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """As the protocol says: the lease lasts until the delta is in the registry."""
        if turn.lease is not None:
            ending = ensureDeferred(self._end(turn.pair, turn.lease, outcome))
            self._ending.add(ending)
            ending.addBoth(lambda _: self._ending.discard(ending))

    async def _end(self, pair: Pair, lease: Lease, outcome: DeltaRow | Failure) -> None:
        try:
            await self._tell(pair, lease, outcome)
        except (ObdeltaError, CancelledError) as error:
            log.warn(
                "other replicas were not told of {pair}: {reason}",
                pair=str(pair),
                reason=str(error),
            )
        finally:
            await self._leases.release(lease)

    async def _tell(self, pair: Pair, lease: Lease, outcome: DeltaRow | Failure) -> None:
        if isinstance(outcome, DeltaRow):
            deadline = self._clock.seconds() + self._push_seconds
            if await self._registry.publish(pair, outcome, deadline) is None:
                return  # the others have no way to it
            text, seconds = outcomes.text_of_row(outcome), ROW_SECONDS
        else:
            verdict = _verdict(outcome.value, self._failure_memory)
            if verdict is None:
                return
            text, seconds = outcomes.text_of_verdict(verdict[0], str(outcome.value)), verdict[1]
        told = await self._leases.finish(lease, text, seconds)
        await self._count("shared.told" if told else "shared.overtaken")

    async def close(self) -> None:
        """Gives back every turn; what is being pushed must have ended, or is given up."""
        for ending in list(self._ending):
            ending.cancel()
            await ending


def _verdict(error: BaseException | None, failure_memory: float) -> tuple[Outcome, float] | None:
    """What a failure says of the pair for all replicas, and for how many seconds; None: nothing."""
    outcome = verdict_of(error).outcome
    if outcome is None or outcome is not Outcome.ERROR:
        return None if outcome is None else (outcome, VERDICT_SECONDS)
    # It has had its second attempt.
    return (Outcome.ERROR, failure_memory) if isinstance(error, WorkerFailed) else None


def name_of(pair: Pair) -> str:
    """Of the work: the two contents, the recipe, and the repositories in which devices are to find
    the delta.
    """
    return name_of_key(pair.key, pair.base.repository, pair.target.repository)


def name_of_key(key: DeltaKey, base_repository: str, target_repository: str) -> str:
    """The same by its parts."""
    text = f"{key.kind} {key.recipe} {key.base} {key.target} {base_repository} {target_repository}"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
