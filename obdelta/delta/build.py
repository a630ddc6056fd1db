"""Builds one delta layer: indexes, plans, encodes, compresses and proves it.

One search serves all forms that are asked for. Each form is encoded, compressed and proven on its
own.
"""

from __future__ import annotations

import enum
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from obdelta.delta import layer_tar
from obdelta.delta.apply import prove
from obdelta.delta.compress import WRITERS, Compression, Hash, TailFile, Writer
from obdelta.delta.effort import DEFAULT_PRICES, TUNINGS, Effort, Tuning, pricing
from obdelta.delta.engine_compat import check_entries
from obdelta.delta.image import DeltaLayer
from obdelta.delta.kernel.binding import (
    Base,
    LayerFile,
    MappedFile,
    checked,
    ffi,
    lib,
    owned,
    waited_for,
)
from obdelta.delta.layer_index import layer_indexes, target_index
from obdelta.delta.planner import BaseIndex, LayerPlanner
from obdelta.delta.reports.layer_report import SMALL_COPY, explain_layer
from obdelta.delta.size_bound import excess
from obdelta.oci import DiffID, Digest, Form

__all__ = ["RECIPE", "DeltaLayer", "Effort", "LayerBuilder", "LayerFile", "Progress", "build_layer"]

RECIPE = 10
"""Increased whenever the same inputs may give other bytes."""

FORGET_SECONDS = 0.02
"""Between releases of pages while a task is matched."""

SMALL = 1024 * 1024
"""Smaller layers are written and proven in one thread: images may have 120 of a few bytes."""


class Stage(enum.StrEnum):
    """The stage of a build."""

    INDEX = "index"
    MATCH = "match"
    DEFLATE = "deflate"
    PROVE = "prove"


class Progress(NamedTuple):
    """``done`` of ``of`` target bytes in the stage."""

    stage: str
    done: int
    of: int


def build_layer(
    base: Sequence[LayerFile],
    target: LayerFile | DiffID,
    out: Path,
    *,
    form: Form = Form.UNIVERSAL,
    prices: Mapping[Form, float] = DEFAULT_PRICES,
    effort: Effort = Effort.BALANCED,
    threads: int = 1,
    index_dir: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> DeltaLayer:
    """Writes the compressed tar of the librsync stream that makes ``target`` from ``base`` to
    ``out``, and proves it.

    If ``target`` is a DiffID, that layer is in the base unchanged, and one copy makes it.
    ``prices`` are the bytes that a command may cost in each form: the plan has the least sum of
    compressed bytes and commands times their price. The same inputs, prices and effort give the
    same bytes for any number of ``threads``. Raises ProofFailed (``out`` is removed), and
    ValueError for a DiffID that is not in the base.
    """
    with LayerBuilder(
        base, prices=prices, effort=effort, threads=threads, index_dir=index_dir
    ) as builder:
        return builder.build(target, {form: out}, progress)[form]


class LayerBuilder:
    """Builds several layers of one target image from the same base, which is read once. A context
    manager.

    Arguments are those of :func:`build_layer`. At most two calls of :meth:`build` may run at a
    time: one for a layer from its tar, and one for a layer that is in the base unchanged.
    """

    def __init__(
        self,
        base: Sequence[LayerFile],
        *,
        prices: Mapping[Form, float] = DEFAULT_PRICES,
        effort: Effort = Effort.BALANCED,
        threads: int = 1,
        index_dir: Path | None = None,
    ) -> None:
        self._layers, self._tuning = base, TUNINGS[effort]
        self._threads, self._index_dir = max(1, threads), index_dir
        self._prices = prices
        self._closing = ExitStack()
        self._base = self._closing.enter_context(Base([layer.path for layer in base]))
        sizes = [file.size for file in self._base.files]
        places = list(zip(base, self._base.starts, sizes, strict=True))
        self._places = {layer.diff_id: place for layer, *place in reversed(places)}
        """Positions and sizes of the base's layers."""
        self._pool = self._closing.enter_context(ThreadPoolExecutor(self._threads, "delta"))
        most = 2 * len(Form)  # two layers at a time
        self._writers = self._closing.enter_context(ThreadPoolExecutor(most, "write"))
        self._prover = self._closing.enter_context(ThreadPoolExecutor(most, "prove"))
        self._index: BaseIndex | None = None
        self.indexes_kept = self.indexes_made = 0
        """The base's layers whose index was found in ``index_dir``, or was made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def check_addressable(self) -> None:
        """Raises BaseUnusable if an engine would order the base's bytes differently
        (:mod:`obdelta.delta.engine_compat`).
        """
        check_entries(self._layers, self._base_index().layers)

    def build(
        self,
        target: LayerFile | DiffID,
        outs: Mapping[Form, Path],
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[Form, DeltaLayer]:
        """Builds one layer as :func:`build_layer` does, in each form of ``outs`` and to its path.

        The layer is searched once and planned for each form, so the forms' tars differ.
        """
        layer = _LayerBuild(
            self._base,
            self._pool,
            self._writers,
            self._prover,
            self._tuning,
            {form: self._prices[form] for form in outs},
            outs,
            self._threads,
            progress,
        )
        try:
            if isinstance(target, DiffID):
                if target not in self._places:
                    raise ValueError(f"{target} is not a layer of the base")
                return layer.copied(target, *self._places[target])
            return layer.built(target, self._base_index)
        except BaseException:
            for out in outs.values():
                out.unlink(missing_ok=True)
            raise

    def _base_index(self) -> BaseIndex:
        if self._index is None:
            found = layer_indexes(self._layers, self._base.files, self._index_dir, self._pool)
            indexes = list(found)
            self.indexes_kept = sum(index.kept for index in indexes)
            self.indexes_made = len(indexes) - self.indexes_kept
            self._index = BaseIndex(self._base, indexes)
        return self._index


class _LayerBuild:
    """The build of one layer, stage by stage."""

    def __init__(
        self,
        base: Base,
        pool: ThreadPoolExecutor,
        writers: ThreadPoolExecutor,
        prover: ThreadPoolExecutor,
        tuning: Tuning,
        prices: Mapping[Form, float],
        outs: Mapping[Form, Path],
        threads: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._base, self._pool, self._writers, self._prover = base, pool, writers, prover
        self._tuning, self._prices, self._outs = tuning, prices, outs
        self._threads, self._progress = threads, progress
        self._seconds: dict[str, float] = {}
        self._encoded, self._failed = dict.fromkeys(outs, 0), False
        """Target bytes that are encoded in each form, and whether one form has failed."""

    def copied(self, target: DiffID, start: int, size: int) -> dict[Form, DeltaLayer]:
        """Returns a layer that is in the base unchanged, from ``start`` on."""
        plans = dict.fromkeys(self._outs, layer_tar.copy_plan(start, size))
        return self._in_each_form(plans, None, target, size)

    def built(
        self, target: LayerFile, base_index: Callable[[], BaseIndex]
    ) -> dict[Form, DeltaLayer]:
        """Returns a layer that is built from its tar."""
        file = MappedFile(target.path)
        try:
            with _timed(self._seconds, Stage.INDEX):
                tar = target_index(file, self._pool)
                planner = LayerPlanner(base_index(), file, tar, self._tuning, self._pool)
                self._forget(file)
            with _timed(self._seconds, Stage.MATCH):
                plans = self._planned(planner, file)
            layers = self._in_each_form(plans, file, target.diff_id, file.size)
            for form, layer in layers.items():
                above = excess(
                    file, planner.changed, tar, layer.literal_bytes, layer.size, self._prices[form]
                )
                explained = explain_layer(plans[form], file, tar, layer.size, planner)
                layers[form] = layer._replace(explained=explained, excess=above, lost=planner.lost)
            return layers
        finally:
            file.close()

    def _planned(self, planner: LayerPlanner, file: MappedFile) -> dict[Form, Any]:
        """Returns the layer's plan for each form."""
        pricings = [pricing(form, price) for form, price in self._prices.items()]
        plans = {
            form: owned(lib.od_plan_of(ffi.NULL, 0), lib.od_free_plan) for form in self._prices
        }
        tasks = planner.tasks()
        futures = deque(self._pool.submit(planner.plans, task, pricings) for task in tasks)
        with waited_for(futures):
            for task in tasks:
                # Each page that a match reads maps its neighbours too, all over the base.
                while not wait([futures[0]], FORGET_SECONDS).done:
                    self._forget(file)
                for plan, part in zip(plans.values(), futures.popleft().result(), strict=True):
                    checked(lib.od_append(plan, part))
                self._forget(file)
                self._report(Stage.MATCH, task.end, file.size)
        return plans

    def _in_each_form(
        self, plans: Mapping[Form, Any], file: MappedFile | None, target: DiffID, size: int
    ) -> dict[Form, DeltaLayer]:
        """Writes all forms at once. Where one fails, the others end early."""
        if size <= SMALL:
            return {form: self._written(plans[form], form, file, target, size) for form in plans}
        futures = {
            form: self._writers.submit(self._finished, plans[form], form, file, target, size)
            for form in self._outs
        }
        with waited_for(futures.values()):
            return {form: future.result() for form, future in futures.items()}

    def _finished(self, *arguments: Any) -> DeltaLayer:
        try:
            return self._written(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _written(
        self, plan: Any, form: Form, file: MappedFile | None, target: DiffID, size: int
    ) -> DeltaLayer:
        tally = ffi.new("od_tally *")
        lib.od_count(plan.commands, plan.count, SMALL_COPY, tally)
        tar, blob = hashlib.sha256(), hashlib.sha256()
        stream = layer_tar.stream_size(plan)
        tar_size = layer_tar.tar_size(stream)
        seconds, passed = dict(self._seconds), partial(self._passed, form, size)
        with TailFile(self._outs[form]) as out:
            # The output is read back from the file; a large one is proven while it is written.
            what = self._base, out, target
            proof = self._prover.submit(prove, *what) if size > SMALL else None
            try:
                with _timed(seconds, Stage.DEFLATE):
                    writer = self._writer(form, out, blob, tar_size)
                    for piece in layer_tar.pieces(plan, file, stream, passed):
                        tar.update(piece)
                        writer.put(piece)
                        if self._encoded[form] < size:
                            self._forget(file)
                    writer.finish()
            finally:
                out.end()
                if proof is not None:
                    with _timed(seconds, Stage.PROVE):
                        wait([proof])  # before the file is closed
            if proof is not None:
                proof.result()
            else:
                with _timed(seconds, Stage.PROVE):
                    prove(*what)
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
            seconds,
            literals=tally.literals,
        )

    def _writer(self, form: Form, out: TailFile, blob: Hash, tar_size: int) -> Writer:
        parameters = self._tuning.compression[form]
        return WRITERS[form](
            Compression(out, blob, tar_size, parameters, self._pool, self._threads)
        )

    def _passed(self, form: Form, whole: int, at: int) -> None:
        """Reports the target bytes that every form has encoded. Raises CancelledError if
        another form has failed.
        """
        if self._failed:
            raise CancelledError
        self._encoded[form] = at
        self._report(Stage.DEFLATE, min(self._encoded.values()), whole)

    def _forget(self, file: MappedFile | None) -> None:
        self._base.forget()
        if file is not None:
            file.forget()

    def _report(self, stage: Stage, done: int, of: int) -> None:
        if self._progress is not None:
            self._progress(Progress(stage.value, done, of))


@contextmanager
def _timed(seconds: dict[str, float], stage: Stage) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage.value] = time.perf_counter() - started
