"""Computes how large a delta layer may be, from its tar's entries; a larger one shows a fault.

Entries with an equal one in the base cost almost nothing. The others compress about as they do
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import isal.igzip_lib

from obdelta.delta.kernel.binding import MappedFile, ffi
from obdelta.delta.tar_index import Member

MARGIN = 1.1
ENTRY_BYTES, NEW_ENTRY_BYTES, LAYER_BYTES = 32, 128, 1024
"""Compressed bytes that an entry's headers may cost, and a layer's own framing."""
ENTRY_LITERALS = 128
"""Up to this many literal bytes in an entry's headers need no closer check."""
ENTRY_COMMANDS = 4
"""Commands for an entry at most: two copies and two literals, in its headers and its content."""
_SAMPLES, _SAMPLE = 16, 16 * 1024


def excess(
    target: MappedFile,
    changed: Sequence[Member],
    tar: Any,
    literal_bytes: int,
    size: int,
    price: float,
) -> int:
    """Returns the bytes that a finished layer of ``size`` has above its bound; 0 is the normal
    result.

    ``changed`` are those of the target's entries (of its ``od_tar``) without an equal one in the
    base. Samples are deflated only if there are more ``literal_bytes`` than the changed entries
    have. A plan that saves a command may have ``price`` bytes more; copying just the equal entries
    takes a few commands for each of them.
    """
    entries, walked = tar.count, tar.stopped
    entry_bytes = ENTRY_BYTES + ENTRY_COMMANDS * price
    outside = target.size - walked
    if outside <= _SAMPLE:  # a tar's padding
        outside = 0
    bytes_of_changed = outside + sum(member.size for member in changed)
    if literal_bytes <= bytes_of_changed + ENTRY_LITERALS * entries + _SAMPLE:
        return 0
    content = outside + _ratio(target, changed) * (bytes_of_changed - outside)
    bound = MARGIN * content + entry_bytes * entries + NEW_ENTRY_BYTES * len(changed) + LAYER_BYTES
    return max(0, size - int(bound))


def _ratio(target: MappedFile, members: Sequence[Member]) -> float:
    """Returns the deflated share of the size of the members' contents, from even samples."""
    total = sum(member.size for member in members)
    step = max(_SAMPLE, total // _SAMPLES)
    size = packed = at = 0
    wanted = 0
    for member in members:
        while wanted < at + member.size and size < _SAMPLES * _SAMPLE:
            inside = wanted - at
            taken = min(_SAMPLE, member.size - inside)
            sample = ffi.buffer(target.at + member.content + inside, taken)
            packed += len(isal.igzip_lib.compress(sample, 1))
            size += taken
            wanted += step
        at += member.size
    return min(1.0, packed / size) if size else 1.0
