"""Effort levels of a build, and prices of commands on devices. ``docs/update-time.md`` explains the
defaults.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from obdelta.delta.kernel.binding import ffi, lib
from obdelta.oci import Form

KB, MB = 1024, 1024 * 1024


class Effort(enum.Enum):
    """The setting ``effort``: trades building time for bytes."""

    FAST = "fast"
    BALANCED = "balanced"
    SMALL = "small"


@dataclass(frozen=True)
class Tuning:
    """The parameters of an effort. Sizes are in bytes; ``c`` is the kernel's ``od_effort``."""

    c: Any
    compression: Mapping[Form, Mapping[str, int]]
    """Parameters of the compressors (:data:`obdelta.delta.compress.WRITERS`)."""
    sample_all: bool
    """Whether all of the base is searched, however unlikely a match is."""


def _zstd(strategy: int, **parameters: int) -> dict[str, int]:
    """Returns zstd's search. Levels below 18 take no matches of 3 bytes: if there are many copies,
    they give more bytes than gzip. So the parameters are set one by one.
    """
    return {"strategy": strategy, "min_match": 3, **parameters}


def _tuning(
    compression: Mapping[Form, Mapping[str, int]], *, sample_all: bool = False, **c: int
) -> Tuning:
    return Tuning(ffi.new("od_effort *", c), compression, sample_all)


TUNINGS = {
    Effort.FAST: _tuning(
        {
            Form.GZIP: {"level": 6},
            Form.ZSTD: _zstd(7, search_log=1, hash_log=17, chain_log=18, target_length=16),
        },
        key=8,
        step=12,
        gap=32,
        trust_gap=16,
        trust_run=16,
        shortest=24,
        unit=256 * KB,
        pad_floor=512,
        pad_ratio=1,
        pad_most=16 * KB,
        window_ratio=4,
    ),
    Effort.BALANCED: _tuning(
        {
            Form.GZIP: {"level": 7},
            Form.ZSTD: _zstd(9, search_log=4, hash_log=20, chain_log=21, target_length=64),
        },
        key=8,
        step=8,
        gap=32,
        trust_gap=8,
        trust_run=16,
        shortest=12,
        unit=256 * KB,
        pad_floor=2 * KB,
        pad_ratio=4,
        pad_most=64 * KB,
        window_ratio=6,
    ),
    Effort.SMALL: _tuning(
        {
            Form.GZIP: {"level": 12},
            # zstd's level 19.
            Form.ZSTD: _zstd(9, search_log=7, hash_log=22, chain_log=22, target_length=256),
        },
        key=6,
        step=1,
        gap=64,
        trust_gap=0,
        trust_run=0,
        shortest=6,
        unit=1 * MB,
        pad_floor=64 * KB,
        pad_ratio=8,
        pad_most=1 * MB,
        window_ratio=12,
        sample_all=True,
    ),
}

COMMAND_MICROSECONDS = {Form.GZIP: 16.0, Form.ZSTD: 40.0}
"""Microseconds of a command on the reference machine, by the form that is pulled: engine 20, engine
25.
"""
UNPACKED_BYTES = {Form.GZIP: 1250, Form.ZSTD: 2500}
"""Bytes that an engine unpacks in the time of one command: about 13 ms a megabyte if a command
takes 16 µs, and 16 ms if it takes 40 µs. ``docs/update-time.md`` separates 8 ms a megabyte and
85 µs a file; here both are one figure, as numbers of files are not recorded.
"""
_KERNEL_FORMS = {Form.GZIP: lib.OD_GZIP, Form.ZSTD: lib.OD_ZSTD}
"""How the kernel estimates the bytes of literals after compression."""
DEVICE_FACTOR = 10.0
"""Factor by which devices are slower than the reference machine."""
DEFAULT_LINK = 500_000
"""Bits a second of a device's link."""
OVERLAP = 0.6
"""An engine downloads while it works. This share of the shorter of the two is not hidden by the
longer one.
"""
PRICE_SHARE = 0.4
"""A command may cost this share of the bytes that arrive while a device runs it. Near its minimum
the time of an update hardly depends on the price, but its bytes do.
"""


def command_prices(
    link: float, microseconds: Mapping[Form, float] = COMMAND_MICROSECONDS
) -> dict[Form, float]:
    """Returns how many bytes a command may cost in each form, for devices on a link of ``link``
    bits a second. With 0, only bytes count.

    ``microseconds``: a command's time on the reference machine.
    """
    return {form: command_price(link, microseconds[form] * DEVICE_FACTOR) for form in microseconds}


def command_price(link: float, microseconds: float) -> float:
    """Returns how many bytes a command may cost, for devices on a link of ``link`` bits a second
    that run it in ``microseconds``.
    """
    return PRICE_SHARE * microseconds * link / 8_000_000


def arriving_bytes(commands: int, price: float) -> float:
    """Returns the bytes that arrive while a device runs commands of this price."""
    return commands * price / PRICE_SHARE


DEFAULT_PRICES = command_prices(DEFAULT_LINK)


def pricing(form: Form, price: float) -> Any:
    """Returns the kernel's ``od_pricing`` for commands that may cost ``price`` bytes."""
    command = min(round(price * 8 * 64), lib.OD_DEAREST_COMMAND)
    return ffi.new("od_pricing *", {"form": _KERNEL_FORMS[form], "command": command})
