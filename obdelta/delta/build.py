"""Builds one delta layer: indexes, plans, encodes, compresses and proves it."""

from __future__ import annotations

import enum
import hashlib
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from obdelta.delta.apply import prove
from obdelta.delta.compress import GzipWriter
from obdelta.delta.effort import TUNINGS, Effort, Tuning
from obdelta.delta.engine_compat import check_entries
from obdelta.delta.kernel.binding import (
    NONE,
    Base,
    LayerFile,
    MappedFile,
    checked,
    ffi,
    lib,
    owned,
    waited_for,
)
from obdelta.delta.layer_index import LayerIndex, layer_indexes, target_index
from obdelta.delta.planner import BaseIndex, LayerPlanner
from obdelta.delta.reports.layer_report import SMALL_COPY, ExplainedLayer, explain_layer
from obdelta.delta.size_bound import excess
from obdelta.delta.tail_file import PipedFile
from obdelta.oci import DiffID, Digest

__all__ = ["RECIPE", "DeltaLayer", "Effort", "LayerBuilder", "LayerFile", "Progress", "build_layer"]

RECIPE = 7
"""Increased whenever the same inputs may give other bytes."""

MB = 1024 * 1024
SMALLEST_MEMBER, MEMBER = 2 * MB, 4 * MB
PIECES = 4
"""A gzip member holds this fraction of the tar, within these sizes, so that several cores can
compress.
"""

_MAGIC, _END = b"\x72\x73\x02\x36", b"\x00"


class Stage(enum.StrEnum):
    """The stage of a build."""

    INDEX = "index"
    MATCH = "match"
    DEFLATE = "deflate"
    PROVE = "prove"


class Progress(NamedTuple):
    """Progress: ``done`` of ``of`` target bytes in the stage."""

    stage: str
    done: int
    of: int


class DeltaLayer(NamedTuple):
    """A finished, proven delta layer: ``digest`` and ``size`` of the blob, ``diff_id`` and
    ``tar_size`` of the tar inside.

    ``target`` is the diff_id of the target layer. ``small_copies`` are copies of less than 64
    bytes. ``seconds`` are given by stage. ``explained`` is None for a layer that lies whole in the
    base. ``excess`` are the bytes above the bound that its entries give
    (:mod:`obdelta.delta.size_bound`). ``lost`` are known bytes that a plan had lost before it was
    replaced: 0 unless there is a fault in the search.
    """

    digest: Digest
    size: int
    diff_id: DiffID
    tar_size: int
    target: DiffID
    copies: int
    small_copies: int
    literal_bytes: int
    copied_bytes: int
    seconds: dict[str, float]
    explained: ExplainedLayer | None = None
    excess: int = 0
    lost: int = 0


def build_layer(
    base: Sequence[LayerFile],
    target: LayerFile | DiffID,
    out: Path,
    *,
    effort: Effort = Effort.BALANCED,
    threads: int = 1,
    index_dir: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> DeltaLayer:
    """Writes the gzip'd tar of the librsync stream that makes ``target`` from ``base`` to ``out``,
    and proves it.

    If ``target`` is a DiffID, that layer lies whole in the base, and one copy makes it. The same
    inputs and effort give the same bytes for any number of ``threads``. Raises ProofFailed (``out``
    is removed), and ValueError for a DiffID that is not in the base.
    """
    with LayerBuilder(base, effort=effort, threads=threads, index_dir=index_dir) as builder:
        return builder.build(target, out, progress)


class LayerBuilder:
    """Builds several layers of one target image from the same base, which is read once. A context
    manager.

    Arguments are those of :func:`build_layer`. At a time, one :meth:`build` of a layer from its tar
    may run, and beside it one of a layer that lies whole in the base.
    """

    def __init__(
        self,
        base: Sequence[LayerFile],
        *,
        effort: Effort = Effort.BALANCED,
        threads: int = 1,
        index_dir: Path | None = None,
    ) -> None:
        self._layers, self._tuning, self._threads, self._index_dir = (
            base,
            TUNINGS[effort],
            max(1, threads),
            index_dir,
        )
        self._closing = ExitStack()
        self._base = self._closing.enter_context(Base([layer.path for layer in base]))
        self._pool = self._closing.enter_context(ThreadPoolExecutor(self._threads, "delta"))
        self._prover = self._closing.enter_context(ThreadPoolExecutor(2, "prove"))
        self._index: BaseIndex | None = None
        self.indexes_kept = self.indexes_made = 0
        """The base's layers whose index was found in ``index_dir``, or was made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def check_addressable(self) -> None:
        """Raises BaseUnusable where an engine would order the base's bytes differently
        (:mod:`obdelta.delta.engine_compat`).
        """
        check_entries(self._layers, self._base_index().layers)

    def build(
        self,
        target: LayerFile | DiffID,
        out: Path,
        progress: Callable[[Progress], None] | None = None,
    ) -> DeltaLayer:
        """Builds one layer as :func:`build_layer` does."""
        layer = _LayerBuild(
            self._base, self._pool, self._prover, self._tuning, out, 2 * self._threads, progress
        )
        try:
            if isinstance(target, DiffID):
                return layer.copied(target, self._place_of(target))
            return layer.built(target, self._base_index)
        except BaseException:
            out.unlink(missing_ok=True)
            raise

    def _place_of(self, target: DiffID) -> tuple[int, int]:
        for layer, file, start in zip(
            self._layers, self._base.files, self._base.starts, strict=True
        ):
            if layer.diff_id == target:
                return start, file.size
        raise ValueError(f"{target} is not a layer of the base")

    def _base_index(self) -> BaseIndex:
        if self._index is None:
            indexes = layer_indexes(self._layers, self._base.files, self._index_dir, self._pool)
            self._index = BaseIndex(self._base, self._counted(indexes))
        return self._index

    def _counted(self, indexes: Iterable[LayerIndex]) -> Iterator[LayerIndex]:
        for index in indexes:
            self.indexes_kept += index.kept
            self.indexes_made += not index.kept
            yield index


class _LayerBuild:
    """The build of one layer, stage by stage."""

    def __init__(
        self,
        base: Base,
        pool: ThreadPoolExecutor,
        prover: ThreadPoolExecutor,
        tuning: Tuning,
        out: Path,
        ahead: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._base, self._pool, self._prover, self._tuning, self._out = (
            base,
            pool,
            prover,
            tuning,
            out,
        )
        self._ahead, self._progress = ahead, progress
        self._seconds: dict[str, float] = {}

    def copied(self, target: DiffID, place: tuple[int, int]) -> DeltaLayer:
        """Returns a layer that lies whole in the base, at ``place`` (position and size)."""
        return self._finished(_copy_plan(*place), None, target)

    def built(self, target: LayerFile, base_index: Callable[[], BaseIndex]) -> DeltaLayer:
        """Returns a layer that is built from its tar."""
        file = MappedFile(target.path)
        try:
            with self._stage(Stage.INDEX):
                tar = target_index(file, self._pool)
                planner = LayerPlanner(base_index(), file, tar, self._tuning, self._pool)
                self._forget(file)
            with self._stage(Stage.MATCH):
                plan = self._matched(planner, file)
            layer = self._finished(plan, file, target.diff_id)
            above = excess(
                file, planner.changed, tar.count, tar.stopped, layer.literal_bytes, layer.size
            )
            explained = explain_layer(plan, file, tar, layer.size)
            return layer._replace(explained=explained, excess=above, lost=planner.lost)
        finally:
            file.close()

    def _matched(self, planner: LayerPlanner, file: MappedFile) -> Any:
        plan = owned(lib.od_plan_of(ffi.NULL, 0), lib.od_free_plan)
        tasks = planner.tasks()
        futures = deque(self._pool.submit(planner.plan, task) for task in tasks)
        with waited_for(futures):
            for task in tasks:
                checked(lib.od_append(plan, futures.popleft().result()))
                self._forget(file)
                self._report(Stage.MATCH, task.end, file.size)
        return plan

    def _finished(self, plan: Any, file: MappedFile | None, target: DiffID) -> DeltaLayer:
        tar, blob = hashlib.sha256(), hashlib.sha256()
        tar_size = 0
        with PipedFile(self._out) as out:
            # The output is proven while it is written, read back from the file.
            proof = self._prover.submit(prove, self._base, out, target)
            try:
                with self._stage(Stage.DEFLATE):
                    writer = GzipWriter(out, blob, self._pool, self._tuning.level, self._ahead)
                    for piece in self._pieces(plan, file):
                        tar.update(piece)
                        tar_size += len(piece)
                        writer.put(piece)
                    writer.finish()
            finally:
                out.end()
                with self._stage(Stage.PROVE):
                    wait([proof])  # before the file is closed
        proof.result()
        tally = ffi.new("od_tally *")
        lib.od_count(plan.commands, plan.count, SMALL_COPY, tally)
        return DeltaLayer(
            Digest(blob.hexdigest()),
            writer.size,
            DiffID(tar.hexdigest()),
            tar_size,
            target,
            tally.copies,
            tally.small_copies,
            tally.literal_bytes,
            tally.copied,
            self._seconds,
        )

    def _pieces(self, plan: Any, file: MappedFile | None) -> Iterator[bytearray]:
        """Yields the tar in pieces that become one gzip member each."""
        size = len(_MAGIC) + lib.od_encoded_size(plan.commands, plan.count) + len(_END)
        member = min(max(size // PIECES, SMALLEST_MEMBER), MEMBER)
        at, next_command = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        target, target_size = (file.at, file.size) if file is not None else (ffi.NULL, NONE)
        piece = bytearray(_tar_header(size) + _MAGIC)
        buffer = bytearray(MEMBER)
        room = ffi.from_buffer("uint8_t[]", buffer)
        while next_command[0] < plan.count:
            # A command is at most a literal of 1 MB, so each round makes progress; a piece may be
            # larger by that much.
            made = lib.od_encode(
                plan.commands, plan.count, next_command, target, target_size, at, room, member
            )
            piece += memoryview(buffer)[:made]
            if len(piece) >= member:
                yield piece
                piece = bytearray()
                self._forget(file)
            self._report(Stage.DEFLATE, at[0], at[0] if file is None else file.size)
        piece += _END + bytes(-size % 512 + 1024)
        yield piece

    def _forget(self, file: MappedFile | None) -> None:
        self._base.forget()
        if file is not None:
            file.forget()

    @contextmanager
    def _stage(self, stage: Stage) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage.value] = time.perf_counter() - started

    def _report(self, stage: Stage, done: int, of: int) -> None:
        if self._progress is not None:
            self._progress(Progress(stage.value, done, of))


def copy_tar(start: int, size: int) -> bytes:
    """Returns the tar of a delta layer that copies ``size`` bytes of the base from ``start`` on."""
    plan = _copy_plan(start, size)
    commands = bytearray(lib.od_encoded_size(plan.commands, plan.count))
    if commands:
        at, next_command = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        room = ffi.from_buffer("uint8_t[]", commands)
        lib.od_encode(
            plan.commands, plan.count, next_command, ffi.NULL, NONE, at, room, len(commands)
        )
    stream = _MAGIC + commands + _END
    return _tar_header(len(stream)) + stream + bytes(-len(stream) % 512 + 1024)


def _copy_plan(start: int, size: int) -> Any:
    command = ffi.new("od_command[]", [{"size": size, "source": start}] if size else [])
    return owned(lib.od_plan_of(command, len(command)), lib.od_free_plan)


def _tar_header(size: int) -> bytes:
    entry = tarfile.TarInfo("delta")
    entry.size, entry.mode, entry.mtime = size, 0o600, 0
    return entry.tobuf(tarfile.GNU_FORMAT)
