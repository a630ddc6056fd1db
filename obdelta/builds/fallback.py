"""A builder that tries several in order (setting ``builder`` with several names)."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.logger import Logger

from obdelta.builds.types import Builder, Grows, Pair, Report
from obdelta.errors import BuildTimedOut, EngineFailed, EngineUnavailable, ProofFailed, WorkerFailed
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import DeltaRow, Kind

log = Logger()


class FirstThatWorks:
    """Tries builders in order: the next one when a builder cannot build, not when the images are
    unusable.
    """

    def __init__(self, builders: Sequence[Builder]) -> None:
        self._builders = builders
        self.kind: Kind = builders[0].kind
        self.recipe = builders[0].recipe

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        grows: Grows,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Builds with the first builder that can. Raises what the last one raises."""
        for builder in self._builders[:-1]:
            try:
                return await builder.build(pair, credentials, report, grows, low_memory=low_memory)
            except BuildTimedOut:
                raise
            except (EngineUnavailable, EngineFailed, ProofFailed, WorkerFailed) as error:
                log.warn(
                    "{pair}: the next builder is asked, as {reason}",
                    pair=str(pair),
                    reason=str(error),
                )
        return await self._builders[-1].build(
            pair, credentials, report, grows, low_memory=low_memory
        )
