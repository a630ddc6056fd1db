"""What to copy from where: a target layer cut into tasks, each with the windows of the base that it is searched in.

A tar's structure is used to find good windows and to skip what is equal as a whole. It is a hint, never a condition: a
layer whose tar cannot be read is one long range of bytes, and planned as such.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from obdelta.delta.effort import Tuning
from obdelta.delta.index import SAMPLE_BITS, LayerIndex
from obdelta.delta.kernel import NONE, Base, MappedFile, checked, ffi, lib, owned
from obdelta.delta.tarmap import members

GRANULE_BITS = 16
"""Regions of the base are voted for in units of 64 KB."""
MARGIN = 8 * 1024
"""Bytes that a window reaches further than what was found."""
NEAR_GAPS = 4096
"""Gaps this near to each other are voted for in one go, in bytes."""
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
    """All that is known of a base: one :class:`LayerIndex` a layer, the coarse index over all, and where names are."""

    def __init__(self, base: Base, indexes: Sequence[LayerIndex], most_samples: int) -> None:
        self.base, self.indexes = base, indexes
        self.tars = ffi.new("od_tar *[]", [index.tar for index in indexes])
        total = sum(index.sample_count for index in indexes)
        thin = max(0, (total // most_samples).bit_length())
        self.coarse = owned(lib.od_coarse_new(total, SAMPLE_BITS, thin), lib.od_free_coarse)
        for index, start in zip(indexes, base.starts, strict=True):
            lib.od_coarse_add(self.coarse, index.samples, index.sample_count, start)
        self.by_name: dict[bytes, Range] = {}
        self.by_stem: defaultdict[bytes, list[Range]] = defaultdict(list)
        for index, start in zip(indexes, base.starts, strict=True):
            for member in index.members():
                place = Range(start + member.start, start + member.end)
                self.by_name[member.name] = place  # the topmost layer's stays
                if member.size:
                    self.by_stem[stem(member.name)].append(place)


def stem(name: bytes) -> bytes:
    """A path with its version numbers blanked: ``foo-1.2.3.dist-info/RECORD`` and ``foo-1.10.dist-info/RECORD`` meet."""
    return _DIGITS.sub(b"0", name)


class LayerPlanner:
    """Plans one target layer. ``tasks()`` may be run in any order and in several threads by :meth:`plan`."""

    def __init__(self, index: BaseIndex, target: MappedFile, tar: Any, tuning: Tuning) -> None:
        self._index, self._target, self._tuning = index, target, tuning
        self._base = index.base
        found = ffi.new("uint64_t[]", max(1, tar.count))
        tars = index.tars
        checked(lib.od_same_members(self._base.c, tars, target.at, target.size, tar, found))
        self._spans = owned(lib.od_same_spans(self._base.c, target.at, target.size, tar, found), lib.od_free_spans)
        self._span_starts: list[int] = []
        self._span_reach: list[int] = []
        reach = 0
        for i in range(self._spans.count):
            span = self._spans.spans[i]
            reach = max(reach, span.at + span.size)
            self._span_starts.append(span.at)
            self._span_reach.append(reach)
        self._changed = [m for i, m in enumerate(members(tar)) if found[i] == NONE]
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
        start, left, gaps = 0, self._tuning.chunk, list[Range]()
        for gap in self.gaps():
            at = gap.start
            while at < gap.end:
                end = min(gap.end, at + left)
                gaps.append(Range(at, end))
                left -= end - at
                at = end
                if left <= 0:
                    tasks.append(Task(start, at, gaps))
                    start, left, gaps = at, self._tuning.chunk, []
        if start < self._target.size:
            tasks.append(Task(start, self._target.size, gaps))
        return tasks

    def plan(self, task: Task) -> Any:
        """The task's ``od_plan``."""
        windows = self._windows(task) if task.gaps else []
        c_windows = ffi.new("od_span[]", max(1, len(windows)))
        for window, place in zip(c_windows, windows, strict=False):
            window.source, window.size = place.start, place.end - place.start
        first = bisect.bisect_right(self._span_reach, task.start)
        last = bisect.bisect_left(self._span_starts, task.end)
        return owned(
            lib.od_plan_range(
                self._base.c, self._index.coarse, self._target.at, self._target.size, task.start, task.end,
                self._spans.spans + first, max(0, last - first), c_windows, len(windows), self._tuning.c,
            ),
            lib.od_free_plan,
        )  # fmt: skip

    def _windows(self, task: Task) -> list[Range]:
        """Where in the base to search densely: entries of the same or a like name, then what shares most samples."""
        budget = self._tuning.window_floor + self._tuning.window_ratio * sum(gap.end - gap.start for gap in task.gaps)
        budget = min(budget, self._tuning.window_most)
        chosen: list[Range] = []
        for place in self._candidates(task):
            size = place.end - place.start
            if size <= budget:
                chosen.append(place)
                budget -= size
        return self._merged(chosen)

    def _candidates(self, task: Task) -> Iterator[Range]:
        by_name, by_stem = self._index.by_name, self._index.by_stem
        for gap in task.gaps:
            for i in range(bisect.bisect_right(self._changed_ends, gap.start), len(self._changed)):
                member = self._changed[i]
                if member.start >= gap.end:
                    break
                same = by_name.get(member.name)
                if same is not None:
                    yield self._facing(same, member.start, member.end, gap)
                elif member.size:
                    like = by_stem.get(stem(member.name), ())
                    nearest = sorted(like, key=lambda place: abs(place.end - place.start - member.size))
                    for place in nearest[: self._tuning.stems]:
                        yield self._facing(place, member.start, member.end, gap)
        yield from self._voted(task)

    def _facing(self, place: Range, start: int, end: int, gap: Range) -> Range:
        """The part of an old entry that lies where the gap does in the new one; all of it, if it is not large."""
        if place.end - place.start <= self._tuning.chunk:
            return place
        shift = place.start - start
        longer = abs((place.end - place.start) - (end - start))
        return Range(
            min(max(place.start, gap.start + shift - longer - MARGIN), place.end),
            max(min(place.end, gap.end + shift + longer + MARGIN), place.start),
        )

    def _voted(self, task: Task) -> list[Range]:
        votes: defaultdict[int, int] = defaultdict(int)
        room = self._tuning.regions
        regions = ffi.new("od_region[]", room)
        for near in _joined(task.gaps, NEAR_GAPS):
            if near.end - near.start < 64:
                continue
            count = checked(
                lib.od_vote(
                    self._base.c, self._index.coarse, self._target.at, self._target.size, near.start, near.end,
                    GRANULE_BITS, regions, room,
                )
            )  # fmt: skip
            for i in range(count):
                votes[regions[i].start] += regions[i].votes
        ranked = sorted(votes, key=lambda start: (-votes[start], start))
        return [Range(start - MARGIN, start + (1 << GRANULE_BITS) + MARGIN) for start in ranked[:room]]

    def _merged(self, places: list[Range]) -> list[Range]:
        """Disjoint, inside one layer each, in order."""
        merged: list[Range] = []
        bounds = [
            Range(start, start + file.size) for start, file in zip(self._base.starts, self._base.files, strict=True)
        ]
        for place in _joined(sorted(places), 0):
            for layer in bounds:
                start, end = max(place.start, layer.start), min(place.end, layer.end)
                if end - start >= 8:
                    merged.append(Range(start, end))
        return merged


def _joined(ranges: Sequence[Range], apart: int) -> list[Range]:
    """Sorted ranges with those joined that are at most ``apart`` from each other."""
    joined: list[Range] = []
    for place in ranges:
        if joined and place.start <= joined[-1].end + apart:
            joined[-1] = Range(joined[-1].start, max(joined[-1].end, place.end))
        else:
            joined.append(place)
    return joined
