"""Numbers of variable length in rsync's protocol 30 and newer.

Source: rsync's ``io.c`` as its readers behave; there is no other description.
"""

from __future__ import annotations

import struct

# Bytes that follow the first one, by its upper six bits.
_EXTRA = (0,) * 32 + (1,) * 16 + (2,) * 8 + (3,) * 4 + (4,) * 2 + (5, 6)
_INT = struct.Struct("<i")


def read_int(buffer: bytes | bytearray, at: int) -> tuple[int, int]:
    """Returns ``(value, end)`` of four bytes. All readers here raise IndexError if the buffer
    ends too early.
    """
    if len(buffer) < at + 4:
        raise IndexError
    return _INT.unpack_from(buffer, at)[0], at + 4


def read_varint(buffer: bytes | bytearray, at: int) -> tuple[int, int]:
    """Returns ``(value, end)`` of a signed 32-bit number in one to five bytes. Raises ValueError
    for a longer one.
    """
    first = buffer[at]
    extra = _EXTRA[first >> 2]
    if not extra:
        return first, at + 1
    if extra > 4:
        raise ValueError("a number is longer than 32 bits")
    end = at + 1 + extra
    if len(buffer) < end:
        raise IndexError
    low = int.from_bytes(buffer[at + 1 : end], "little")
    value = low | (first & ((1 << (8 - extra)) - 1)) << (8 * extra)
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32), end


def read_varlong(buffer: bytes | bytearray, at: int, min_length: int) -> tuple[int, int]:
    """Returns ``(value, end)`` of a signed 64-bit number in ``min_length`` to nine bytes."""
    first = buffer[at]
    extra = _EXTRA[first >> 2]
    end = at + min_length + extra
    if len(buffer) < end:
        raise IndexError
    if min_length + extra > 9:
        raise ValueError("a number is longer than 64 bits")
    high = first & ((1 << (8 - extra)) - 1) if extra else first
    value = int.from_bytes(buffer[at + 1 : end], "little") | high << (8 * (end - at - 1))
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (value >> 63 << 64), end


def int_bytes(value: int) -> bytes:
    """Returns the number as four bytes."""
    return _INT.pack(value)


def zero_varint(length: int) -> bytes:
    """Returns a zero that takes ``length`` bytes (1 to 5): readers accept numbers that are longer
    than necessary.
    """
    return bytes([(0x00, 0x80, 0xC0, 0xE0, 0xF0)[length - 1]]) + bytes(length - 1)
