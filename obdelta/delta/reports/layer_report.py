"""Explains a delta layer's size: literal bytes and copies for each entry of the target's tar.

The kernel counts (``report.c``), right after a layer was built, while its plan is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import isal.igzip_lib

from obdelta.delta.kernel.binding import NONE, MappedFile, ffi, lib
from obdelta.delta.reports.entry_changes import (
    MAX_ARCHIVES,
    MAX_HEADER,
    MIN_ARCHIVE,
    TIMES,
    Change,
    changed_entry,
    same_content,
)
from obdelta.delta.tar_index import Entries, Member
from obdelta.oci import printable_name

TOP = 20
"""Entries that are reported one by one."""
SMALL_COPY = 64
"""Copies of fewer bytes are counted as small."""
COPY_BYTES = 6.0
"""Approximate blob bytes of a copy command: 5.5 to 6.5 in layers of published packages."""

RETIMED_BYTES = 30
"""Approximate blob bytes of an entry whose times alone changed: two copies, and digits."""

_HEADER_LITERALS = 1024
_RETIMED_SAMPLES = 64
_SHARE_WORDS = ffi.sizeof("od_share") // 8
_REST_SAMPLES = 32
_SAMPLES, _SAMPLE = 4, 16 * 1024
"""Samples of one entry's literals that are deflated, and their size in bytes."""


@dataclass(frozen=True, slots=True)
class Share:
    """The costs of a part of a target layer. Its size in the tar, headers included, is
    ``literal_bytes`` + ``copied_bytes``.

    ``wire_bytes`` is its part of the finished blob: an estimate from deflated samples of its
    literals, scaled so that all parts together have the blob's size. A copy counts where it begins;
    small ones have less than 64 bytes.
    """

    literal_bytes: int
    copied_bytes: int
    copies: int
    small_copies: int
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class Entry(Share):
    """One entry of a layer's tar. ``name`` is printable text (:func:`obdelta.oci.printable_name`),
    ``size`` is that of its content.

    ``change``, ``archive``: see :class:`obdelta.delta.reports.entry_changes.Change`. ``saved`` are
    about the bytes that its advice would save.
    """

    name: str
    size: int
    change: str = ""
    archive: str = ""
    saved: int = 0


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """``entries`` in a layer's tar, of which ``changed`` have literal bytes; the ``top`` ones by
    literal bytes, most first; and the costs of the ``rest`` of the layer.

    Only the times of ``retimed`` entries changed, and ``retimed_bytes`` are about their bytes of
    the blob.
    """

    entries: int
    changed: int
    top: tuple[Entry, ...]
    rest: Share
    retimed: int = 0
    retimed_bytes: int = 0


class EntryVersions(Protocol):
    """Knows the base's versions of a target's entries."""

    @property
    def entries(self) -> Entries:
        """The target's entries."""

    @property
    def places(self) -> Sequence[int]:
        """For each entry, the base position of its whole content, or NONE."""

    @property
    def verdicts(self) -> dict[int, Change]:
        """Verdicts that are known already, by entry: those of the layer's other form."""

    def old_version(self, number: int) -> Member | None:
        """Returns the base entry that an entry is a new version of."""

    def base_bytes(self, start: int, end: int) -> memoryview:
        """Returns bytes of the base, of one layer."""


def explain_layer(
    plan: Any,
    target: MappedFile,
    tar: Any,
    blob_size: int,
    versions: EntryVersions,
) -> ExplainedLayer:
    """Returns the costs of a finished layer of ``blob_size`` bytes by entry. ``plan`` is its
    od_plan, ``tar`` the target's od_tar.
    """
    return _Sharing(plan, target, tar, versions).explained(blob_size)


class _Sharing:
    """The calculation for one layer."""

    def __init__(
        self,
        plan: Any,
        target: MappedFile,
        tar: Any,
        versions: EntryVersions,
    ) -> None:
        self._plan, self._target, self._tar = plan, target, tar
        self._versions = versions
        self._shares = ffi.new("od_share[]", tar.count + 1)
        self._changed = lib.od_share_out(
            plan.commands, plan.count, tar.members, tar.count, SMALL_COPY, self._shares
        )
        self._sample = bytearray(_SAMPLES * _SAMPLE)

    def explained(self, blob_size: int) -> ExplainedLayer:
        found = self._biggest(TOP + _REST_SAMPLES)
        top, others = found[:TOP], found[TOP:]
        counts = [self._counts(number) for number in top]
        tally = ffi.new("od_tally *")
        lib.od_count(self._plan.commands, self._plan.count, SMALL_COPY, tally)
        whole = (tally.literal_bytes, tally.copied, tally.copies, tally.small_copies)
        literals, copied, copies, small = (
            total - sum(parts) for total, *parts in zip(whole, *counts, strict=True)
        )
        weights = [
            its[0] * self._ratio([number], _SAMPLES) + its[2] * COPY_BYTES
            for number, its in zip(top, counts, strict=True)
        ]
        rest_weight = literals * self._ratio(others or top, 1) + copies * COPY_BYTES
        scale = blob_size / max(1.0, sum(weights) + rest_weight)
        wire = [int(weight * scale) for weight in weights]
        changes = [self._change(number, rank) for rank, number in enumerate(top)]
        rest = Share(literals, copied, copies, small, blob_size - sum(wire))
        retimed = self._retimed()
        return ExplainedLayer(
            self._tar.count,
            self._changed,
            tuple(
                Entry(
                    *its,
                    part,
                    printable_name(self._versions.entries.names[number]),
                    self._tar.members[number].size,
                    change.kind,
                    change.archive,
                    int(part * change.saved),
                )
                for number, its, part, change in zip(top, counts, wire, changes, strict=True)
            ),
            rest,
            retimed,
            min(blob_size, retimed * RETIMED_BYTES),
        )

    def _change(self, number: int, rank: int) -> Change:
        """Returns the verdict of an entry; those of the highest ``rank`` may be looked into."""
        verdicts = self._versions.verdicts
        if number not in verdicts:
            verdicts[number] = self._examined(number, rank)
        return verdicts[number]

    def _examined(self, number: int, rank: int) -> Change:
        versions = self._versions
        member, old = versions.entries.member(number), versions.old_version(number)
        if member.size and versions.places[number] != NONE:
            if old is not None and old.content != versions.places[number]:
                old = None
            size = min(member.content - member.start, MAX_HEADER + 1)
            header = bytes(ffi.buffer(self._target.at + member.start, size))
            before = b""
            if old is not None:
                end = min(old.content, old.start + MAX_HEADER + 1)
                before = bytes(versions.base_bytes(old.start, end))
            return same_content(header, old, before, member)
        content = memoryview(ffi.buffer(self._target.at + member.content, member.size))
        literal = self._shares[number].literal_bytes
        return changed_entry(
            member,
            content,
            old,
            None if old is None else versions.base_bytes(old.content, old.content + old.size),
            lambda: self._ratio([number], _SAMPLES) if 2 * literal >= member.size else 0.0,
            look_inside=rank < MAX_ARCHIVES and literal >= MIN_ARCHIVE,
        )

    def _retimed(self) -> int:
        """Returns about how many entries changed only in their times, from evenly spaced ones."""
        if not self._changed:
            return 0
        places = self._versions.places
        literals = memoryview(ffi.buffer(self._shares)).cast("B").cast("Q")[::_SHARE_WORDS]
        headers = [
            number
            for number in range(self._tar.count)
            if 0 < literals[number] <= _HEADER_LITERALS and places[number] != NONE
        ]
        step = max(1, len(headers) // _RETIMED_SAMPLES)
        sampled = headers[::step]
        found = sum(self._change(number, TOP).kind == TIMES for number in sampled)
        return len(headers) * found // len(sampled) if sampled else 0

    def _biggest(self, most: int) -> list[int]:
        found = ffi.new("uint64_t[]", most)
        return list(found[0 : lib.od_biggest(self._shares, self._tar.count, most, found)])

    def _counts(self, number: int) -> tuple[int, int, int, int]:
        share = self._shares[number]
        return share.literal_bytes, share.copied, share.copies, share.small_copies

    def _ratio(self, numbers: Sequence[int], samples: int) -> float:
        """Returns the deflated share of the size of these entries' literals, estimated from
        ``samples`` samples of each.
        """
        size = packed = 0
        for number in numbers:
            taken = self._taken(number, samples)
            if taken:
                size += taken
                packed += len(isal.igzip_lib.compress(memoryview(self._sample)[:taken], 1))
        return min(1.0, packed / size) if size else 1.0

    def _taken(self, number: int, samples: int) -> int:
        """Fills the sample with literals from evenly spaced positions of an entry; returns the byte
        count.
        """
        share = self._shares[number]
        room = ffi.from_buffer("uint8_t[]", self._sample)
        step = max(_SAMPLE, share.literal_bytes // samples)
        taken = 0
        for skip in range(0, min(share.literal_bytes, step * samples), step):
            taken += lib.od_literals(
                self._plan.commands,
                self._plan.count,
                ffi.addressof(self._shares, number),
                ffi.addressof(self._tar.members, number),
                self._target.at,
                skip,
                room + taken,
                _SAMPLE,
            )
        return taken
