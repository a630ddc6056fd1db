"""Plans a target layer: cuts it into tasks, and gives each the hints and known spans for its
search.

The kernel's ``plan/`` plans each task. A tar's structure is used to find likely matches and to
skip entries that are equal as a whole. It is a hint, never a condition: a layer whose tar cannot be
read is planned as one long range of bytes.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count
from typing import Any, NamedTuple

from obdelta.delta.effort import Tuning
from obdelta.delta.kernel.binding import NONE, Base, MappedFile, checked, ffi, lib, owned
from obdelta.delta.layer_index import LayerIndex
from obdelta.delta.reports.entry_changes import Change
from obdelta.delta.sampling import Stretch, joined, sampled_index, whole
from obdelta.delta.tar_index import Entries, Member

SMALLEST_TASK, LARGEST_TASK = 256 * 1024, 4 * 1024 * 1024
"""Bytes to be searched in one task. A smaller task costs more than it saves. A larger one takes
more memory, and leaves threads without work at the end.
"""
COMPARE = 64 * 1024 * 1024
"""Bytes that are compared before mapped pages are released."""
STRANGE = 32
"""All of the base is sampled if the target has more than this fraction of the base's size in
entries without a similar name.
"""
REPLACED = 8
"""A base layer with more than this fraction of itself in the target layer counts as replaced by it.
"""
_SPAN = struct.Struct("=QQQ")

STRICT = False
"""Whether a plan that loses known bytes fails the build.

The tests set it; a server uses the known spans instead.
"""


class Range(NamedTuple):
    """A half-open range, in bytes."""

    start: int
    end: int


class Task(NamedTuple):
    """Target bytes ``[start, end)``, of which ``gaps`` are not known to be in the base."""

    start: int
    end: int
    gaps: list[Range]


class BaseIndex:
    """The index of a base: its layers' entries, and their positions by name."""

    def __init__(self, base: Base, indexes: Iterable[LayerIndex]) -> None:
        """``indexes`` has one entry a layer, in order."""
        self.base = base
        self._kept = list(indexes)
        self.layers = [Entries(index.tar) for index in self._kept]
        self.tars = ffi.new("od_tar *[]", [index.tar for index in self._kept])
        self.blocks = owned(
            lib.od_blocks_new(sum(index.block_count for index in self._kept)), lib.od_free_blocks
        )
        for index, start in zip(self._kept, base.starts, strict=True):
            lib.od_blocks_add(self.blocks, index.blocks, index.block_count, start)
        self._firsts = [0, *accumulate(map(len, self.layers))]
        # Entries are numbered over all layers; of equal names, the topmost layer's entry stays.
        self._by_name = dict(
            zip((name for layer in self.layers for name in layer.names), count(), strict=False)
        )
        self._by_stem: dict[bytes, list[tuple[int, int]]] = {}
        """Sizes and numbers of the entries with a stem, smallest first."""

    def _learn_stems(self, members: Iterable[Member]) -> None:
        """Indexes entries by their stems, only for stems that will be looked up: a list for each
        would take longer than everything else.
        """
        found: dict[bytes, list[tuple[int, int]]] = {
            stem(member.name): []
            for member in members
            if member.size and member.name not in self._by_name
        }
        found = {key: [] for key in found.keys() - self._by_stem.keys()}
        if not found:
            return
        number = 0
        for layer in self.layers:
            for name, fields in zip(layer.names, layer.fields, strict=True):
                if fields[2] and (others := found.get(stem(name))) is not None:
                    others.append((fields[2], number))
                number += 1
        for others in found.values():
            others.sort()
        self._by_stem.update(found)

    def _member(self, number: int) -> Member:
        layer = bisect.bisect_right(self._firsts, number) - 1
        return self.layers[layer].member(number - self._firsts[layer], self.base.starts[layer])

    def like(self, members: Sequence[Member]) -> list[Member | None]:
        """Returns, for each member, the base entry that it is most probably a new version of."""
        self._learn_stems(members)
        return [self._like(member) for member in members]

    def named(self, name: bytes) -> Member | None:
        """Returns the base entry of this name; of several, the topmost layer's."""
        number = self._by_name.get(name)
        return self._member(number) if number is not None else None

    def _like(self, member: Member) -> Member | None:
        same = self.named(member.name)
        if same is not None:
            return same
        if not member.size:
            return None
        others = self._by_stem.get(stem(member.name))
        if not others:
            return None
        # The nearest sizes are on both sides of the insertion point; of equal ones the first entry.
        above = bisect.bisect_left(others, (member.size, 0))
        below = bisect.bisect_left(others, (others[above - 1][0], 0)) if above else above
        near = [others[place] for place in (below, above) if place < len(others)]
        _, number = min(near, key=lambda other: abs(other[0] - member.size))
        return self._member(number)


def stem(name: bytes) -> bytes:
    """Returns a path without digits and dots, so that ``foo-1.2.3.dist-info/RECORD`` and
    ``foo-1.10.dist-info/RECORD`` are equal.
    """
    return name.translate(None, b"0123456789.")


class LayerPlanner:
    """Plans one target layer. :meth:`plans` may be called for the :meth:`tasks` in any order and in
    several threads.
    """

    def __init__(
        self,
        index: BaseIndex,
        target: MappedFile,
        tar: Any,
        tuning: Tuning,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._index, self._target, self._tar, self._tuning = index, target, tar, tuning
        self._base = index.base
        found = ffi.new("uint64_t[]", max(1, tar.count))
        self._exact = owned(
            lib.od_exact_new(self._base.c, index.tars, target.at, target.size, tar),
            lib.od_free_exact,
        )
        while checked(lib.od_exact_next(self._exact, COMPARE, found)) < tar.count:
            self._base.forget()
            target.forget()
        count = ffi.new("uint64_t *")
        self._spans = lib.od_exact_spans(self._exact, count)
        spans = [
            (at, at + size) for at, size, _ in _SPAN.iter_unpack(_bytes(self._spans, count[0]))
        ]
        self._span_starts = [start for start, _ in spans]
        self._span_reach = list(accumulate((end for _, end in spans), max))
        places: list[int] = ffi.unpack(found, tar.count)
        self.places = places
        """For each entry, the base position of its content, or NONE."""
        self.verdicts: dict[int, Change] = {}
        self.entries = entries = Entries(tar)
        """The target's entries."""
        changed = [entries.member(number) for number, place in enumerate(places) if place == NONE]
        self._changed = list(zip(changed, index.like(changed), strict=True))
        self.changed = changed
        """The target's entries without an equal one in the base."""
        self._changed_ends = [member.end for member in changed]
        self._gaps = list(self._between_spans())
        self._sampled = sampled_index(self._base, self._sampled_ranges(entries, places), pool)
        self._lost: list[int] = []
        """Known bytes that plans of tasks sent as literals; such plans are not used. Threads
        append.
        """

    def old_version(self, number: int) -> Member | None:
        """Returns the base entry that an entry of the target is most probably a new version of.

        If the base has the entry's content, only an entry of the same name counts.
        """
        member = self.entries.member(number)
        if self.places[number] != NONE:
            return self._index.named(member.name)
        (old,) = self._index.like([member])
        return old

    def base_bytes(self, start: int, end: int) -> memoryview:
        """Returns bytes of the base, as far as they are in one layer."""
        layer = bisect.bisect_right(self._base.starts, start) - 1
        file, first = self._base.files[layer], self._base.starts[layer]
        end = min(end - first, file.size)
        return memoryview(ffi.buffer(file.at + (start - first), max(0, end - (start - first))))

    @property
    def lost(self) -> int:
        """Returns the known bytes that plans made literals before they were replaced.

        Other than 0 is a fault of the kernel.
        """
        return sum(self._lost)

    def _sampled_ranges(self, entries: Entries, places: list[int]) -> list[Stretch]:
        """Returns the base's bytes that may hold the changed entries; ``places`` are the positions
        of all ``entries``.
        """
        if self._tuning.sample_all:
            return whole(self._base)
        gaps = sum(end - start for start, end in self._gaps)
        known = sum(member.end - member.start for member, old in self._changed if old is not None)
        if (gaps - known) * STRANGE >= self._base.size:
            return whole(self._base)
        starts = self._base.starts
        given = [0] * len(starts)
        found: list[Stretch] = []
        for _, old in self._changed:
            if old is not None and old.size:
                layer = bisect.bisect_right(starts, old.start) - 1
                found.append(Stretch(layer, old.start - starts[layer], old.end - starts[layer]))
                given[layer] += old.end - old.start
        for fields, place in zip(entries.fields, places, strict=True):
            if place != NONE:
                given[bisect.bisect_right(starts, place) - 1] += fields[2]
        kept_places, kept_names = set(places), set(entries.names)
        for layer, (start, file) in enumerate(zip(starts, self._base.files, strict=True)):
            if given[layer] * REPLACED >= file.size:
                olds = self._index.layers[layer]
                found += (
                    Stretch(layer, fields[0], fields[3])
                    for name, fields in zip(olds.names, olds.fields, strict=True)
                    if fields[2] and name not in kept_names and start + fields[1] not in kept_places
                )
        return joined(found)

    def _between_spans(self) -> Iterator[Range]:
        """Yields the target's ranges between the known spans."""
        at = 0
        for start, reach in zip(self._span_starts, self._span_reach, strict=True):
            if start > at:
                yield Range(at, start)
            at = max(at, reach)
        if at < self._target.size:
            yield Range(at, self._target.size)

    def tasks(self) -> list[Task]:
        """Returns the target in ranges that have an eighth of the bytes to be searched each, within
        the bounds of a task.
        """
        tasks: list[Task] = []
        searched = sum(end - start for start, end in self._gaps)
        size = min(max(searched // 8, SMALLEST_TASK), LARGEST_TASK)
        start, left, gaps = 0, size, list[Range]()
        for gap in self._gaps:
            at = gap.start
            while at < gap.end:
                end = min(gap.end, at + left)
                gaps.append(Range(at, end))
                left -= end - at
                at = end
                if left <= 0:
                    tasks.append(Task(start, at, gaps))
                    start, left, gaps = at, size, []
        if start < self._target.size:
            tasks.append(Task(start, self._target.size, gaps))
        return tasks

    def plans(self, task: Task, pricings: Sequence[Any]) -> list[Any]:
        """Returns the task's ``od_plan`` for each ``od_pricing``. The search is done once."""
        job, _kept = self._job(task)
        matches = owned(lib.od_find_matches(job), lib.od_free_matches)
        return [self._plan(job, matches, pricing) for pricing in pricings]

    def _job(self, task: Task) -> tuple[Any, Any]:
        """Returns the task's ``od_job``, and what must be kept as long as it is used."""
        hints = ffi.new("od_hint[]", list(self._hints(task)))
        first = bisect.bisect_right(self._span_reach, task.start)
        last = bisect.bisect_left(self._span_starts, task.end)
        job = {
            "base": self._base.c,
            "tars": self._index.tars,
            "sampled": self._sampled,
            "blocks": self._index.blocks,
            "target": self._target.at,
            "target_size": self._target.size,
            "tar": self._tar,
            "from": task.start,
            "to": task.end,
            "spans": self._spans + first,
            "span_count": max(0, last - first),
            "hints": hints,
            "hint_count": len(hints),
            "effort": self._tuning.c,
        }
        return ffi.new("od_job *", job), hints

    def _plan(self, job: Any, matches: Any, pricing: Any) -> Any:
        plan = owned(lib.od_plan_job(job, matches, pricing), lib.od_free_plan)
        lost = lib.od_lost(job, plan, pricing)
        if not lost:
            return plan
        if STRICT:
            start, end = getattr(job, "from"), job.to
            raise AssertionError(
                f"{lost} known bytes became literals in target bytes {start} to {end}"
            )
        self._lost.append(lost)
        return owned(lib.od_plan_known(job), lib.od_free_plan)

    def _hints(self, task: Task) -> Iterator[tuple[int, int, int, int]]:
        """Yields the base ranges that the changed entries are new versions of."""
        done = 0
        for gap in task.gaps:
            for i in range(
                max(done, bisect.bisect_right(self._changed_ends, gap.start)), len(self._changed)
            ):
                member, old = self._changed[i]
                if member.start >= gap.end:
                    break
                done = i + 1
                if old is not None:
                    yield member.start, member.end - member.start, old.start, old.end - old.start


def _bytes(pointer: Any, count: int) -> Any:
    """Returns a C array as a buffer."""
    return ffi.buffer(pointer, count * ffi.sizeof(ffi.typeof(pointer).item)) if count else b""
