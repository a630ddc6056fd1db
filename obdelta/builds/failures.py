"""Remembered failures: which pairs get no delta (too large, failed, too slow), and for how long.

A remembered failure is answered with a full pull, without a build.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from twisted.logger import Logger

from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import BuildCancelled, FullPull, Pair
from obdelta.builds.verdicts import CATEGORY, Advice, FailedElsewhere, verdict_of
from obdelta.errors import (
    Denied,
    DigestMismatch,
    Missing,
    ObdeltaError,
    ProgramUnusable,
    SizeMismatch,
    Unauthorized,
    UpstreamUnavailable,
    WorkerFailed,
    WorkTooLong,
)
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import FailureRow, Outcome

log = Logger()

FAILURES_UNTIL_FULL_PULL = 3
TOO_LARGE_MEMORY = 86400
"""Seconds that a verdict on the contents of two images is remembered. Then they are built again,
since the recipe or ``max-delta-ratio`` may have changed.
"""


_PERSONAL = (
    Unauthorized,
    Denied,
    Missing,
    UpstreamUnavailable,
    DigestMismatch,
    SizeMismatch,
    DeltaTooLarge,
)
"""Errors that may not apply to other repositories with the same contents, to another form, or to
other credentials.
"""


class NoDelta(Exception):
    """There is no delta, for ``reason``: the answer is a full pull. ``pair``: where known."""

    def __init__(self, reason: str, category: str, pair: Pair | None = None) -> None:
        self.reason, self.category, self.pair = reason, category, pair
        super().__init__(reason)

    def answer(self) -> FullPull:
        """Returns the answer to the request."""
        full_bytes = None if self.pair is None else self.pair.full_bytes
        return FullPull(self.reason, self.category, full_bytes)


class Failures:
    """The failures in the catalogue. An error of a build counts for ``memory`` seconds, a verdict
    on the contents for :data:`TOO_LARGE_MEMORY`. ``now`` gives the time of day.
    """

    def __init__(
        self, catalogue: Catalogue, memory: float, now: Callable[[], float] = time.time
    ) -> None:
        self._catalogue, self._memory, self._now = catalogue, memory, now

    async def find(self, pair: Pair) -> FailureRow | None:
        """Returns the failure for which the pair is not built now, None if it may be built."""
        now = int(self._now())
        failure = await self._catalogue.failures.find(
            pair.kind,
            pair.base.manifest.digest,
            pair.target.manifest.digest,
            now,
            TOO_LARGE_MEMORY,
            pair.repositories,
            pair.form,
        )
        if failure is not None and failure.outcome is not Outcome.ERROR:
            return failure
        slow = await self._catalogue.slow_work.reason(pair.work, now)
        if slow is not None:
            key = pair.key
            return FailureRow(
                pair.kind, key.base, key.target, Outcome.ERROR, slow, FAILURES_UNTIL_FULL_PULL, now
            )
        if failure is None:
            return None
        fresh = failure.last > now - self._memory
        return failure if fresh and failure.count >= FAILURES_UNTIL_FULL_PULL else None

    async def no_delta(self, pair: Pair, error: ObdeltaError) -> NoDelta | None:
        """Returns the full pull that answers a build's error; None if a retry may help."""
        if isinstance(error, WorkerFailed):
            if isinstance(error, ProgramUnusable) or await self.find(pair) is not None:
                return NoDelta(str(error), CATEGORY[Outcome.ERROR], pair)
            return None
        verdict = verdict_of(error)
        if verdict.advice is not Advice.FULL_PULL:
            return None
        reason = f"a layer is gone: {error}" if isinstance(error, Missing) else str(error)
        return NoDelta(reason, verdict.category, pair)

    async def forget(self, pair: Pair) -> None:
        """Forgets how the pair failed, so that it is built again."""
        key = pair.key
        await self._catalogue.slow_work.forget(pair.work)
        await self._catalogue.failures.forget_with_work(key.kind, key.base, key.target)

    async def record(self, pair: Pair, error: ObdeltaError) -> None:
        """Records the failure of a build, if it concerns the pair. Never raises: the clients
        receive the error in any case.
        """
        try:
            await self._record(pair, error)
        except Exception as trouble:
            log.warn(
                "failure of {pair} was not recorded: {reason}", pair=str(pair), reason=str(trouble)
            )

    async def _record(self, pair: Pair, error: ObdeltaError) -> None:
        outcome = verdict_of(error).outcome
        if outcome is None:
            return  # concerns the client or this server, not the pair
        if isinstance(error, FailedElsewhere):
            return  # holds as long as its key in Redis, where each new request looks
        slow = isinstance(error, WorkTooLong)
        if slow:
            await self._catalogue.slow_work.remember(pair.work, str(error), int(self._now()))
        await self._catalogue.counters.add(f"build.{CATEGORY[outcome]}")
        await self._catalogue.failures.remember(
            pair.kind,
            pair.base.manifest.digest,
            pair.target.manifest.digest,
            outcome,
            str(error),
            int(self._now()),
            TOO_LARGE_MEMORY if outcome is not Outcome.ERROR else int(self._memory),
            # A worker that failed has had its second attempt, and a build that ran out of time or
            # was cancelled gets none.
            times=(
                FAILURES_UNTIL_FULL_PULL if isinstance(error, WorkerFailed | BuildCancelled) else 1
            ),
            repositories=pair.repositories,
            recipe=pair.key.recipe,
            # Only sizes depend on the form.
            form=pair.form if pair.kind == "v3" and outcome is Outcome.TOO_LARGE else None,
            work=pair.work if slow else None,
        )


def concerns_others(
    error: ObdeltaError, build: RunningBuild, pair: Pair, credentials: Credentials
) -> bool:
    """Returns whether a build's error concerns others only: clients of other repositories with the
    same contents, of another form, or with other credentials.
    """
    if not isinstance(error, _PERSONAL):
        return False
    if build.pair.repositories != pair.repositories or build.pair.form is not pair.form:
        return True
    return isinstance(error, Unauthorized | Denied) and build.credentials != credentials
