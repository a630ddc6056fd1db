"""What to copy from where: a target layer cut into tasks, each with the windows of the base that it is searched in.

A tar's structure is used to find good windows and to skip what is equal as a whole. It is a hint, never a condition: a
layer whose tar cannot be read is one long range of bytes, and planned as such.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from obdelta.delta.effort import Tuning
from obdelta.delta.index import SAMPLE_BITS, LayerIndex
from obdelta.delta.kernel import NONE, Base, MappedFile, checked, ffi, lib, owned
from obdelta.delta.tarmap import Member, members

SMALLEST_CHUNK = 256 * 1024
"""Bytes to be searched below which a task is not worth its own costs."""
COMPARE = 64 * 1024 * 1024
"""Bytes that are compared before mapped pages are given back."""
_SPAN = struct.Struct("=QQQ")
_DIGITS = re.compile(rb"[0-9]+")


class Range(NamedTuple):
    """Half-open, in bytes."""

    start: int
    end: int


class Task(NamedTuple):
    """Target bytes ``[start, end)``, of which ``gaps`` are not known to be in the base."""

    start: int
    end: int
    gaps: list[Range]


class BaseIndex:
    """All that is known of a base: the coarse index over all layers, their entries, and where names are."""

    def __init__(self, base: Base, indexes: Iterable[LayerIndex], most_samples: int) -> None:
        """``indexes``: one a layer, in order. The coarse index holds at most about ``most_samples``."""
        self.base = base
        expected = base.size >> SAMPLE_BITS
        thin = ((expected - 1) // most_samples).bit_length() if expected else 0
        self.coarse = owned(lib.od_coarse_new(expected, SAMPLE_BITS, thin), lib.od_free_coarse)
        self._members: list[Member] = []
        kept: list[LayerIndex] = []
        for index, start in zip(indexes, base.starts, strict=True):
            for samples in index.samples:
                lib.od_coarse_add(self.coarse, samples.at, samples.number, start)
            self._members += index.members(start)
            kept.append(index.without_samples())
        self._kept = kept
        self.tars = ffi.new("od_tar *[]", [index.tar for index in kept])
        self._by_name = {member.name: member for member in self._members}  # the topmost layer's stays

    @cached_property
    def _by_stem(self) -> dict[bytes, list[Member]]:
        found: defaultdict[bytes, list[Member]] = defaultdict(list)
        for member in self._members:
            if member.size:
                found[stem(member.name)].append(member)
        return dict(found)

    def like(self, member: Member) -> Member | None:
        """The entry of the base that ``member`` is most probably a new version of."""
        same = self._by_name.get(member.name)
        if same is not None or not member.size:
            return same
        others = self._by_stem.get(stem(member.name), ())
        return min(others, key=lambda other: abs(other.size - member.size), default=None)


def stem(name: bytes) -> bytes:
    """A path with its version numbers blanked: ``foo-1.2.3.dist-info/RECORD`` and ``foo-1.10.dist-info/RECORD`` meet."""
    return _DIGITS.sub(b"0", name)


class LayerPlanner:
    """Plans one target layer. ``tasks()`` may be run in any order and in several threads by :meth:`plan`."""

    def __init__(self, index: BaseIndex, target: MappedFile, tar: Any, tuning: Tuning) -> None:
        self._index, self._target, self._tuning = index, target, tuning
        self._base = index.base
        found = ffi.new("uint64_t[]", max(1, tar.count))
        self._same = owned(lib.od_same_new(self._base.c, index.tars, target.at, target.size, tar), lib.od_free_same)
        while checked(lib.od_same_next(self._same, COMPARE, found)) < tar.count:
            self._base.forget()
            target.forget()
        count = ffi.new("uint64_t *")
        self._spans = lib.od_same_spans(self._same, count)
        spans = [(at, at + size) for at, size, _ in _SPAN.iter_unpack(_bytes(self._spans, count[0]))]
        self._span_starts = [start for start, _ in spans]
        self._span_reach = list(accumulate((end for _, end in spans), max))
        self._changed = [
            m for m, place in zip(members(tar), ffi.unpack(found, tar.count), strict=True) if place == NONE
        ]
        self._changed_ends = [m.end for m in self._changed]

    def gaps(self) -> Iterator[Range]:
        """What the spans leave of the target."""
        at = 0
        for start, reach in zip(self._span_starts, self._span_reach, strict=True):
            if start > at:
                yield Range(at, start)
            at = max(at, reach)
        if at < self._target.size:
            yield Range(at, self._target.size)

    def tasks(self) -> list[Task]:
        """The target in ranges that hold about the tuning's ``chunk`` of bytes to be searched."""
        tasks: list[Task] = []
        chunk = min(max(sum(gap.end - gap.start for gap in self.gaps()) // 8, SMALLEST_CHUNK), self._tuning.chunk)
        start, left, gaps = 0, chunk, list[Range]()
        for gap in self.gaps():
            at = gap.start
            while at < gap.end:
                end = min(gap.end, at + left)
                gaps.append(Range(at, end))
                left -= end - at
                at = end
                if left <= 0:
                    tasks.append(Task(start, at, gaps))
                    start, left, gaps = at, chunk, []
        if start < self._target.size:
            tasks.append(Task(start, self._target.size, gaps))
        return tasks

    def plan(self, task: Task) -> Any:
        """The task's ``od_plan``."""
        hints = list(self._hints(task))
        c_hints = ffi.new("od_hint[]", hints)
        first = bisect.bisect_right(self._span_reach, task.start)
        last = bisect.bisect_left(self._span_starts, task.end)
        return owned(
            lib.od_plan_range(
                self._base.c, self._index.coarse, self._target.at, self._target.size, task.start, task.end,
                self._spans + first, max(0, last - first), c_hints, len(hints), self._tuning.c,
            ),
            lib.od_free_plan,
        )  # fmt: skip

    def _hints(self, task: Task) -> Iterator[tuple[int, int, int, int]]:
        """What the entries that changed are new versions of."""
        done = 0
        for gap in task.gaps:
            for i in range(max(done, bisect.bisect_right(self._changed_ends, gap.start)), len(self._changed)):
                member = self._changed[i]
                if member.start >= gap.end:
                    break
                done = i + 1
                old = self._index.like(member)
                if old is not None:
                    yield member.start, member.end - member.start, old.start, old.end - old.start


def _bytes(pointer: Any, count: int) -> Any:
    """A C array as a buffer."""
    return ffi.buffer(pointer, count * ffi.sizeof(ffi.typeof(pointer).item)) if count else b""
