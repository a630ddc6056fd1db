"""A slow, plain reference for the format and the search, with which tests compare the C kernel.

Speed does not matter here, and clever code does not belong here. Source: ``docs/delta-format.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from obdelta.errors import StreamInvalid

MAGIC = b"\x72\x73\x02\x36"
_WIDTHS = (1, 2, 4, 8)


class Command(NamedTuple):
    """Copies ``size`` bytes from ``source`` in the base, or (``source`` None) writes the
    ``literal``.
    """

    size: int
    source: int | None
    literal: bytes = b""


def encode(commands: list[Command]) -> bytes:
    """Returns the stream of these commands."""
    return MAGIC + b"".join(_encoded(command) for command in commands) + b"\0"


def _encoded(command: Command) -> bytes:
    if command.source is not None:
        place, size = _width(command.source), _width(command.size)
        return (
            bytes([0x45 + 4 * place + size])
            + _number(command.source, place)
            + _number(command.size, size)
        )
    if command.size <= 64:
        return bytes([command.size]) + command.literal
    size = _width(command.size)
    return bytes([0x41 + size]) + _number(command.size, size) + command.literal


def _width(value: int) -> int:
    return next(i for i, width in enumerate(_WIDTHS) if value < 1 << 8 * width)


def _number(value: int, width: int) -> bytes:
    return value.to_bytes(_WIDTHS[width], "big")


def decode(stream: bytes) -> Iterator[Command]:
    """Returns the commands of a stream; raises StreamInvalid at the first invalid byte."""
    if stream[:4] != MAGIC:
        raise StreamInvalid(0, "magic")
    at = 4

    def take(count: int) -> bytes:
        nonlocal at
        if len(stream) - at < count:
            raise StreamInvalid(at, "it is truncated")
        at += count
        return stream[at - count : at]

    def number(width: int) -> int:
        value: int = struct.unpack(">" + "BHIq"[width], take(_WIDTHS[width]))[0]
        if value < 0:
            raise StreamInvalid(at, "a negative number")
        return value

    while True:
        code = take(1)[0]
        if code == 0:
            break
        if code <= 0x40:
            yield Command(code, None, take(code))
        elif code <= 0x44:
            size = number(code - 0x41)
            yield Command(size, None, take(size))
        elif code <= 0x54:
            source = number((code - 0x45) // 4)
            size = number((code - 0x45) % 4)
            if size == 0:
                raise StreamInvalid(at, "an empty copy")
            yield Command(size, source)
        else:
            raise StreamInvalid(at, "unknown command")
    if at != len(stream):
        raise StreamInvalid(at, "bytes follow its end")


def apply(base: bytes, stream: bytes) -> bytes:
    """Returns the target; raises StreamInvalid."""
    target = bytearray()
    for command in decode(stream):
        if command.source is None:
            target += command.literal
        elif command.source + command.size > len(base):
            raise StreamInvalid(0, "a copy leaves the base")
        else:
            target += base[command.source : command.source + command.size]
    return bytes(target)


def match(base: bytes, target: bytes, shortest: int = 8) -> list[Command]:
    """Searches greedily: at each position the longest copy of ``shortest`` bytes or more, and
    literals between.
    """
    commands: list[Command] = []
    at = literal = 0

    def put_literal() -> None:
        if at > literal:
            commands.append(Command(at - literal, None, target[literal:at]))

    while at < len(target):
        size, source = 0, 0
        while (
            at + size < len(target)
            and (found := base.find(target[at : at + size + 1], source)) >= 0
        ):
            size, source = size + 1, found
        if size >= shortest:
            put_literal()
            commands.append(Command(size, source))
            at += size
            literal = at
        else:
            at += 1
    put_literal()
    return commands
