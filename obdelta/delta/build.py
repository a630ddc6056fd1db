"""One target layer to one proven delta layer."""

from __future__ import annotations

import enum
import hashlib
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from obdelta.delta.deflate import GzipWriter
from obdelta.delta.effort import TUNINGS, Effort
from obdelta.delta.index import layer_index, target_index
from obdelta.delta.kernel import NONE, Base, LayerFile, MappedFile, ffi, lib
from obdelta.delta.plan import BaseIndex, LayerPlanner
from obdelta.delta.verify import prove_layer
from obdelta.oci import DiffID, Digest

__all__ = ["RECIPE", "DeltaLayer", "Effort", "LayerFile", "Progress", "build_layer"]

RECIPE = 1
"""Goes up whenever the same inputs may give other bytes."""

MEMBER = 4 * 1024 * 1024
"""Bytes of tar that become one gzip member."""
SMALL_COPY = 64
"""Copies of fewer bytes are counted as small."""
FORGET_EVERY = 8
"""Tasks after which mapped pages are given back."""
MOST_SAMPLES = 8 * 1024 * 1024
"""Coarse samples that are kept in memory, at 13 bytes each."""

_MAGIC, _END = b"\x72\x73\x02\x36", b"\x00"


class Stage(enum.StrEnum):
    """What a build is at."""

    INDEX = "index"
    MATCH = "match"
    DEFLATE = "deflate"
    PROVE = "prove"


class Progress(NamedTuple):
    """``done`` of ``of`` target bytes in the stage."""

    stage: str
    done: int
    of: int


class DeltaLayer(NamedTuple):
    """A finished, proven delta layer: ``digest`` and ``size`` of the blob, ``diff_id`` and ``tar_size`` of the tar inside.

    ``target`` is the diff_id that it leads to; ``small_copies`` are those of less than 64 bytes; ``seconds`` by stage.
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
    """Write the gzip'd tar of the librsync stream that makes ``target`` from ``base`` to ``out``, and prove it.

    ``target`` as a DiffID: that layer lies whole in the base, and one copy makes it. The same inputs and effort give the same
    bytes, whatever ``threads`` is. Raises ProofFailed (``out`` is removed), ValueError for a DiffID that is not in the base.
    """
    return _LayerBuild(base, out, effort, threads, index_dir, progress).run(target)


class _LayerBuild:
    def __init__(
        self,
        base: Sequence[LayerFile],
        out: Path,
        effort: Effort,
        threads: int,
        index_dir: Path | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._layers, self._out, self._index_dir, self._progress = base, out, index_dir, progress
        self._tuning, self._threads = TUNINGS[effort], max(1, threads)
        self._seconds: dict[str, float] = {}

    def run(self, target: LayerFile | DiffID) -> DeltaLayer:
        with ExitStack() as stack:
            base = stack.enter_context(Base([layer.path for layer in self._layers]))
            pool = stack.enter_context(ThreadPoolExecutor(self._threads, "delta"))
            if isinstance(target, DiffID):
                diff_id, file, commands = target, None, self._whole_layer(base, target)
            else:
                diff_id, file = target.diff_id, MappedFile(target.path)
                stack.callback(file.close)
                commands = self._commands(base, file, pool)
            try:
                layer = self._write(commands, file, diff_id, pool)
                with self._stage(Stage.PROVE):
                    prove_layer(base, self._out, diff_id)
            except BaseException:
                self._out.unlink(missing_ok=True)
                raise
        return layer

    @contextmanager
    def _stage(self, stage: Stage) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - started

    def _report(self, stage: Stage, done: int, of: int) -> None:
        if self._progress is not None:
            self._progress(Progress(stage.value, done, of))

    def _whole_layer(self, base: Base, target: DiffID) -> Any:
        for layer, start in zip(self._layers, base.starts, strict=True):
            if layer.diff_id == target:
                found = [{"size": layer.size, "source": start}] if layer.size else []
                return ffi.new("od_command[]", found)
        raise ValueError(f"{target} is not a layer of the base")

    def _commands(self, base: Base, file: MappedFile, pool: ThreadPoolExecutor) -> Any:
        with self._stage(Stage.INDEX):
            made = [
                pool.submit(layer_index, layer, mapped, self._index_dir)
                for layer, mapped in zip(self._layers, base.files, strict=True)
            ]
            tar = pool.submit(target_index, file)
            index = BaseIndex(base, [future.result() for future in made], MOST_SAMPLES)
            planner = LayerPlanner(index, file, tar.result(), self._tuning)
            base.forget()
            file.forget()
        with self._stage(Stage.MATCH):
            tasks = planner.tasks()
            futures: list[Future[Any]] = [pool.submit(planner.plan, task) for task in tasks]
            plans: list[Any] = []
            for number, (task, future) in enumerate(zip(tasks, futures, strict=True), 1):
                plans.append(future.result())
                self._report(Stage.MATCH, task.end, file.size)
                if number % FORGET_EVERY == 0:
                    base.forget()
                    file.forget()
        return _joined(plans)

    def _write(self, commands: Any, file: MappedFile | None, target: DiffID, pool: ThreadPoolExecutor) -> DeltaLayer:
        with self._stage(Stage.DEFLATE):
            size = len(_MAGIC) + lib.od_encoded_size(commands, len(commands)) + len(_END)
            tar, blob = hashlib.sha256(), hashlib.sha256()
            with self._out.open("wb") as out:
                writer = GzipWriter(out, blob, pool, self._tuning.level, 2 * self._threads)
                tar_size = 0
                for piece in self._pieces(commands, file, size):
                    tar.update(piece)
                    tar_size += len(piece)
                    writer.put(piece)
                writer.finish()
                out.flush()
                os.fsync(out.fileno())
        tally = ffi.new("od_tally *")
        lib.od_count(commands, len(commands), SMALL_COPY, tally)
        return DeltaLayer(
            Digest(blob.hexdigest()), writer.size, DiffID(tar.hexdigest()), tar_size, target,
            tally.copies, tally.small_copies, tally.literal_bytes, tally.copied, self._seconds,
        )  # fmt: skip

    def _pieces(self, commands: Any, file: MappedFile | None, size: int) -> Iterator[bytearray]:
        """The tar, in pieces of about MEMBER bytes."""
        at, next_command = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        target, target_size = (file.at, file.size) if file is not None else (ffi.NULL, NONE)
        piece = bytearray(_tar_header(size) + _MAGIC)
        buffer = bytearray(MEMBER)
        room = ffi.from_buffer("uint8_t[]", buffer)
        while next_command[0] < len(commands):
            made = lib.od_encode(
                commands, len(commands), next_command, target, target_size, at, room, MEMBER - len(piece) % MEMBER
            )
            if made:
                piece += memoryview(buffer)[:made]
            if not made or len(piece) >= MEMBER:
                yield piece
                piece = bytearray()
                if file is not None:
                    file.forget()
            self._report(Stage.DEFLATE, at[0], at[0] if file is None else file.size)
        piece += _END + bytes(-size % 512 + 1024)
        yield piece


def _tar_header(size: int) -> bytes:
    entry = tarfile.TarInfo("delta")
    entry.size, entry.mode, entry.mtime = size, 0o600, 0
    return entry.tobuf(tarfile.GNU_FORMAT)


def _joined(plans: Sequence[Any]) -> Any:
    """The commands of all tasks in one array; a copy that goes on over the border of two is one copy."""
    commands = ffi.new("od_command[]", sum(plan.count for plan in plans))
    count = 0
    for plan in plans:
        if not plan.count:
            continue
        first = plan.commands[0]
        last = commands[count - 1] if count else None
        if last is not None and NONE not in (first.source, last.source) and last.source + last.size == first.source:
            first.source, first.size = last.source, last.size + first.size
            count -= 1
        ffi.memmove(commands + count, plan.commands, plan.count * ffi.sizeof("od_command"))
        count += plan.count
    kept = ffi.new("od_command[]", count)
    ffi.memmove(kept, commands, count * ffi.sizeof("od_command"))
    return kept
