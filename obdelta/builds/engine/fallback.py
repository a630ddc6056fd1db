"""A builder that tries several in order (setting ``builder`` with several names)."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.logger import Logger

from obdelta.builds.types import Builder, Pair, Report, ReportFile
from obdelta.errors import BuildTimedOut, EngineFailed, EngineUnavailable, ProofFailed, WorkerFailed
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import DeltaRow, Kind

log = Logger()


class FallbackBuilder:
    """Tries builders in order: the next one when a builder cannot build, not when the images are
    unusable.
    """

    def __init__(self, builders: Sequence[Builder]) -> None:
        self._builders = builders
        self.kind: Kind = builders[0].kind
        self.recipe, self.forms = builders[0].recipe, builders[0].forms

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Builds with the first builder that can. Raises what the last one raises."""
        for builder in self._builders[:-1]:
            try:
                return await builder.build(
                    pair, credentials, report, report_file, low_memory=low_memory
                )
            except BuildTimedOut:
                raise
            except (EngineUnavailable, EngineFailed, ProofFailed, WorkerFailed) as error:
                log.warn(
                    "{pair} was not built: {reason}: the next builder is used",
                    pair=str(pair),
                    reason=str(error),
                )
        return await self._builders[-1].build(
            pair, credentials, report, report_file, low_memory=low_memory
        )
