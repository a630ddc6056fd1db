"""Padding that rsync ignores: fills a batch up to a length that was announced before it was known.

Between files, a reader ignores NDX_DEL_STATS with five zeros. A number may be longer than
necessary, so that such a packet has 11 to 31 bytes. :class:`obdelta.rsync.batch.Recording` gives
the place in a batch where packets may stand.
"""

from __future__ import annotations

from obdelta.errors import BatchInvalid
from obdelta.rsync import varint

MIN_PADDING = 11
_LARGEST = MIN_PADDING + 5 * 4
_NO_OP = b"\xff\xfe\x80\x03\0\0"
"""NDX_DEL_STATS (-3), written absolutely; five numbers follow."""


class Padding:
    """``length`` bytes of whole packets: 0, or at least MIN_PADDING (BatchInvalid otherwise).
    Readable from any position.
    """

    def __init__(self, length: int) -> None:
        if length and length < MIN_PADDING:
            raise BatchInvalid(f"it cannot have {length} bytes of padding")
        self.length = length
        self._packet = _packet(_LARGEST)
        # The bytes left after the largest packets are fewer than two of them: one packet, or two
        # that share them.
        many = (length - MIN_PADDING) // _LARGEST if length else 0
        self._end_at = many * _LARGEST
        left = length - self._end_at
        first = left if left <= _LARGEST else left - MIN_PADDING
        self._end = b"".join(_packet(part) for part in (first, left - first) if part)

    def read(self, start: int, count: int) -> bytes:
        """Returns bytes ``start`` to ``start + count``, fewer at the end."""
        stop = min(start + count, self.length)
        found = b""
        if start < self._end_at:
            skipped = start % _LARGEST
            wanted = min(stop, self._end_at) - start
            found = (self._packet * ((skipped + wanted) // _LARGEST + 1))[
                skipped : skipped + wanted
            ]
        if stop > self._end_at:
            found += self._end[max(0, start - self._end_at) : stop - self._end_at]
        return found


def _packet(length: int) -> bytes:
    each, longer = divmod(length - len(_NO_OP), 5)
    return _NO_OP + b"".join(varint.zero_varint(each + (number < longer)) for number in range(5))
