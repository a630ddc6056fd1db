"""Explains a delta layer's size: literal bytes and copies for each entry of the target's tar.

The kernel counts (``report.c``), right after a layer was built, while its plan is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import isal.igzip_lib

from obdelta.delta.kernel.binding import MappedFile, ffi, lib
from obdelta.oci import shown

TOP = 20
"""Entries that are reported one by one."""
SMALL_COPY = 64
"""Copies of fewer bytes are counted as small."""
COPY_BYTES = 6.0
"""Approximate blob bytes of a copy command: 5.5 to 6.5 in layers of published packages."""

_STANDING_FOR_THE_REST = 32
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
    """One entry of a layer's tar. ``name`` is printable text (:func:`obdelta.oci.shown`), ``size``
    is that of its content.
    """

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """``entries`` in a layer's tar, of which ``changed`` have literal bytes; the ``top`` ones by
    literal bytes, most first; and the costs of the ``rest`` of the layer.
    """

    entries: int
    changed: int
    top: tuple[Entry, ...]
    rest: Share


def explain_layer(plan: Any, target: MappedFile, tar: Any, blob_size: int) -> ExplainedLayer:
    """Returns the costs of a finished layer of ``blob_size`` bytes by entry. ``plan`` is its
    od_plan, ``tar`` the target's od_tar.
    """
    return _Sharing(plan, target, tar).explained(blob_size)


class _Sharing:
    """The calculation for one layer."""

    def __init__(self, plan: Any, target: MappedFile, tar: Any) -> None:
        self._plan, self._target, self._tar = plan, target, tar
        self._shares = ffi.new("od_share[]", tar.count + 1)
        self._changed = lib.od_share_out(
            plan.commands, plan.count, tar.members, tar.count, SMALL_COPY, self._shares
        )
        self._sample = bytearray(_SAMPLES * _SAMPLE)

    def explained(self, blob_size: int) -> ExplainedLayer:
        found = self._biggest(TOP + _STANDING_FOR_THE_REST)
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
        return ExplainedLayer(
            self._tar.count,
            self._changed,
            tuple(
                Entry(*its, part, shown(self._name(number)), self._tar.members[number].size)
                for number, its, part in zip(top, counts, wire, strict=True)
            ),
            Share(literals, copied, copies, small, blob_size - sum(wire)),
        )

    def _biggest(self, most: int) -> list[int]:
        found = ffi.new("uint64_t[]", most)
        return list(found[0 : lib.od_biggest(self._shares, self._tar.count, most, found)])

    def _counts(self, number: int) -> tuple[int, int, int, int]:
        share = self._shares[number]
        return share.literal_bytes, share.copied, share.copies, share.small_copies

    def _name(self, number: int) -> bytes:
        member = self._tar.members[number]
        return (
            bytes(ffi.buffer(self._tar.names + member.name, member.name_size))
            if member.name_size
            else b""
        )

    def _ratio(self, numbers: Sequence[int], samples: int) -> float:
        """Returns the deflated size of these entries' literals, in bytes a byte, from that many
        samples of each.
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
