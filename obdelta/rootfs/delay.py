"""The delay record at a batch's end: keeps a device's rsync busy until its supervisor has closed
the stream.

Supervisors from 16.2.33 on fail if rsync ends first (``docs/v2.md``). rsync skips a record for a
file that it does not want, token by token. A token of three bytes stands for 65,536 blocks, each of
which costs some nanoseconds and touches no file.

Source: rsync's ``receiver.c`` and ``token.c`` as they read protocol 31; there is no other
documentation.
"""

from __future__ import annotations

import struct

TOKENS = 48_000
"""Tokens of a delay: about 20 s on a processor of 3 GHz, two minutes on the slowest boards.
Supervisors wait 10 s before they close a stream, and 10 minutes for rsync afterwards. More tokens
would not fit into the pipe and the buffers before it, and would delay the closing.
"""
_TOKENS_PER_ABSOLUTE = 30_000
"""Tokens between absolute ones: a token counts from the last one, and a block number has 31 bits.
"""
_ABSOLUTE_RUN, _RELATIVE_RUN = b"\x21" + bytes(4) + b"\xff\xff", b"\xc1\xff\xff"
_TRANSFER = struct.pack("<H", 1 << 15)
_SUMS = struct.Struct("<4i")
_MAX_BLOCKS, _BLOCK, _CHECKSUM = 0x7FFFFFFF, 700, 16


def delay_record(index: int, tokens: int = TOKENS) -> bytes:
    """Returns a record for a file that was sent before; ``index`` is its number in rsync's list.

    It may stand right before the first NDX_DONE that ends the records.
    """
    number = b"\xfe" + bytes(
        [0x80 | index >> 24, index & 0xFF, index >> 8 & 0xFF, index >> 16 & 0xFF]
    )
    sums = _SUMS.pack(_MAX_BLOCKS, _BLOCK, _CHECKSUM, 0)
    whole, rest = divmod(tokens, _TOKENS_PER_ABSOLUTE)
    parts = [_TOKENS_PER_ABSOLUTE] * whole + [rest] * bool(rest)
    runs = b"".join(_ABSOLUTE_RUN + _RELATIVE_RUN * (part - 1) for part in parts)
    return number + _TRANSFER + sums + runs + b"\0" + bytes(_CHECKSUM)
