"""Rebuilds of deltas whose layers were evicted: the same bytes, read by devices while they are
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from obdelta.builds.types import Pair, Report, ReportFile
from obdelta.concurrency.tasks import Threads
from obdelta.errors import BlobUnknown, DigestMismatch
from obdelta.oci import Descriptor, Digest, Form
from obdelta.registry import Credentials
from obdelta.store.catalogue.evictions import Evicted
from obdelta.store.catalogue.records import DeltaRow, Kind
from obdelta.store.file_writer import ExternalFile

UNVERIFIED_TAIL = 4096
"""Bytes at a layer's end that are withheld until its digest has been compared with the known one.
"""
LOOK_EVERY = 0.1
"""Seconds between two checks of the size of a worker process's file."""


class Rebuild:
    """The expected layers, each with a growing file for its readers. ``effort`` and ``prices`` are
    those that they were built with.
    """

    def __init__(self, evicted: Evicted, threads: Threads) -> None:
        self.row, self.effort, self.prices = evicted.row, evicted.effort, evicted.prices
        self._layers: Sequence[Descriptor] = evicted.layers
        self._files = [
            ExternalFile(Path(), threads, length=layer.size, unverified_tail=UNVERIFIED_TAIL)
            for layer in evicted.layers
        ]

    def file(self, digest: Digest) -> ExternalFile | None:
        """Returns the file in which a layer grows."""
        pairs = zip(self._layers, self._files, strict=True)
        return next((file for layer, file in pairs if layer.digest == digest), None)

    def follow(self, paths: Sequence[Path], clock: IReactorTime) -> LoopingCall:
        """Follows the files that a worker process writes, one layer after another, until the call
        is stopped.
        """

        def look() -> None:
            for path, layer, file in zip(paths, self._layers, self._files, strict=True):
                try:
                    size = min(path.stat().st_size, layer.size)
                except FileNotFoundError:
                    return  # not begun
                if file.failure is None and not file.complete and size > file.size:
                    file.path = path
                    file.grew(size)

        call = LoopingCall(look)
        call.clock = clock
        call.start(LOOK_EVERY)
        return call

    def compare(self, results: Sequence[dict[str, Any]]) -> None:
        """Raises DigestMismatch unless the layers have the bytes that devices were promised."""
        for layer, result in zip(self._layers, results, strict=True):
            if result["digest"] != str(layer.digest) or result["size"] != layer.size:
                raise DigestMismatch(layer.digest, result["digest"], "the rebuilt layer")

    def finished(self, path_of: Callable[[Digest], Path | None]) -> None:
        """Marks all layers as published; ``path_of`` gives their paths. Readers get the withheld
        bytes, or BlobUnknown where a layer is gone.
        """
        for layer, file in zip(self._layers, self._files, strict=True):
            path = path_of(layer.digest)
            if path is None:
                file.failed(BlobUnknown(layer.digest))
            elif file.failure is None and not file.complete:
                file.finished(path)

    def failed(self, error: Exception) -> None:
        """Fails the layers that are not whole. Without effect on those that are."""
        for file in self._files:
            file.failed(error)


class Rebuilder(Protocol):
    """A builder that can rebuild a delta."""

    async def rebuild(
        self, pair: Pair, credentials: Credentials, report: Report, rebuild: Rebuild
    ) -> DeltaRow:
        """Builds, compares and publishes; the files of ``rebuild`` grow and end.

        Raises DigestMismatch and what its steps raise.
        """


class RebuildBuilder:
    """The builder of one rebuild, for the queue of builds."""

    kind: Kind = "v3"
    forms: tuple[Form, ...]

    def __init__(self, rebuilder: Rebuilder, rebuild: Rebuild) -> None:
        self._rebuilder, self._rebuild = rebuilder, rebuild
        self.recipe, self.forms = rebuild.row.key.recipe, (rebuild.row.key.form,)

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Builds the same bytes once more. The files of the rebuild grow, not ``report_file``."""
        return await self._rebuilder.rebuild(pair, credentials, report, self._rebuild)
