"""Bounds the size of a delta layer by its tar's entries, to find faults of the search in service.

Entries with an equal one in the base cost almost nothing. The others compress about as they do
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import isal.igzip_lib

from obdelta.delta.kernel.binding import MappedFile, ffi
from obdelta.delta.tar_index import Member

MARGIN = 1.1
ENTRY_BYTES, NEW_ENTRY_BYTES, LAYER_BYTES = 32, 128, 1024
"""Compressed bytes that an entry's headers may cost, and a layer's own framing."""
ENTRY_LITERALS = 128
"""Literal bytes of an entry's headers that give no reason for a closer check."""
_SAMPLES, _SAMPLE = 16, 16 * 1024


def excess(
    target: MappedFile,
    changed: Sequence[Member],
    entries: int,
    walked: int,
    literal_bytes: int,
    size: int,
) -> int:
    """Returns the bytes that a finished layer of ``size`` has above its bound; 0 is the normal
    result.

    ``changed`` are those of the target's ``entries`` without an equal one in the base. ``walked``
    is where the walk over its tar ended. Samples are deflated only where there are more
    ``literal_bytes`` than the changed entries have.
    """
    outside = (
        target.size - walked if target.size - walked > _SAMPLE else 0
    )  # more than a tar's padding
    bytes_of_changed = outside + sum(member.size for member in changed)
    if literal_bytes <= bytes_of_changed + ENTRY_LITERALS * entries + _SAMPLE:
        return 0
    content = outside + _ratio(target, changed) * (bytes_of_changed - outside)
    bound = MARGIN * content + ENTRY_BYTES * entries + NEW_ENTRY_BYTES * len(changed) + LAYER_BYTES
    return max(0, size - int(bound))


def _ratio(target: MappedFile, members: Sequence[Member]) -> float:
    """Returns the deflated size of the members' contents, in bytes a byte, from even samples."""
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
