"""Parsers of settings: functions from text to value, which raise ValueError for invalid text."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?", re.ASCII | re.IGNORECASE)
_LINK = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([kMG])bit/s")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)?", re.ASCII)
_SECONDS = {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
QUOTABLE = re.compile(r"[!#-\[\]-~]+", re.ASCII)
"""Visible ASCII but for the quote and the backslash."""
_PEM_IN_BASE64 = "LS0tLS1CRUdJTi"  # -----BEGIN
ALGORITHMS = (
    "ES256",
    "ES384",
    "ES512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "EdDSA",
)
"""Signature algorithms whose verifier holds no secret (RFC 7518, RFC 8037)."""


def text(value: str) -> str:
    """Parses any one line."""
    if "\n" in value:
        raise ValueError
    return value


def lines(value: str) -> tuple[str, ...]:
    """Parses one item a line, at least one."""
    found = tuple(line.strip() for line in value.splitlines() if line.strip())
    if not found:
        raise ValueError
    return found


def path(value: str) -> Path:
    """Parses a path and makes it absolute."""
    given = Path(text(value))
    try:
        return given.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{given.parts[0]} has no home directory") from error


def paths(value: str) -> tuple[Path, ...]:
    """Parses one path a line."""
    return tuple(path(line) for line in lines(value))


def path_or_pem(value: str) -> Path | bytes:
    """Parses a path and makes it absolute, or decodes a PEM text in base64."""
    compact = "".join(value.split())
    if not compact.startswith(_PEM_IN_BASE64):
        return path(value)
    return base64.b64decode(compact, validate=True)  # binascii.Error is a ValueError


def path_or_word(value: str) -> Path | str:
    """Parses an absolute path, or one of :func:`words`: a token."""
    return path(value) if value.startswith("/") else word(value)


def words(value: str) -> tuple[str, ...]:
    """Parses words of visible ASCII without quotes, separated by blanks or commas. Each word occurs
    once; there is at least one.
    """
    found = tuple(dict.fromkeys(word for word in re.split(r"[\s,]+", value) if word))
    if not found or not all(QUOTABLE.fullmatch(word) for word in found):
        raise ValueError
    return found


def word(value: str) -> str:
    """Parses one of :func:`words`."""
    (found,) = words(value)
    return found


def algorithms(value: str) -> tuple[str, ...]:
    """Parses signature algorithms (RFC 7518, RFC 8037) whose verifier holds no secret."""
    found = words(value)
    if not set(found) <= set(ALGORITHMS):
        raise ValueError
    return found


def yes_no(value: str) -> bool:
    """Parses ``yes`` or ``no``."""
    return choice("yes", "no")(value) == "yes"


def limit(value: str) -> int:
    """Parses a whole number from 1 on, or 0 for no limit."""
    return 0 if value == "0" else count(value)


def choice(*allowed: str) -> Callable[[str], str]:
    """Returns a parser of one of a few words."""

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError
        return value

    return parse


def choices(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """Returns a parser of one or more of a few words, which keeps their order."""

    def parse(value: str) -> tuple[str, ...]:
        found = words(value)
        if not set(found) <= set(allowed):
            raise ValueError
        return found

    return parse


def docker_yes(value: str) -> bool:
    """Parses Docker's kind of flag: any text means yes, except ``no``, ``0`` and ``false``."""
    return text(value).lower() not in ("no", "0", "false")


LEVELS = ("debug", "info", "warn", "error")
AREAS = frozenset(
    [
        "builds",
        "cli",
        "delta",
        "device",
        "face",
        "fleet",
        "logs",
        "metrics",
        "net",
        "oci",
        "registry",
        "rootfs",
        "settings",
        "store",
        "tap",
        "twisted",
        "web",
        "wiring",
    ]
)


def log_levels(value: str) -> Mapping[str, str]:
    """Parses a level and others for areas: ``info, registry=debug, web.devices.app=warn``.
    "" stands for all other areas.
    """
    found: dict[str, str] = {}
    for word in re.split(r"[\s,]+", value.strip()):
        area, equals, level = word.rpartition("=")
        if level not in LEVELS or area in found or (equals and area.partition(".")[0] not in AREAS):
            raise ValueError
        found[area] = level
    return MappingProxyType({"": "info"} | found)


def count(value: str) -> int:
    """Parses a whole number from 1 on."""
    number = int(value)
    if not 1 <= number <= 1_000_000:
        raise ValueError
    return number


def share(value: str) -> float:
    """Parses a number from 0 (no delta is served) to 10 (every delta is)."""
    number = float(value)
    if not 0 <= number <= 10:  # NaN too
        raise ValueError
    return number


def size(value: str) -> int:
    """Parses bytes, alone or with a unit: ``512 MiB``, ``10GiB``, ``1.5 GB``."""
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError
    unit = (match[2] or "B").upper()
    factor = 1 if unit == "B" else (1024 if "I" in unit else 1000) ** ("KMGT".index(unit[0]) + 1)
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def link(value: str) -> float | None:
    """Parses bits a second (``0.5 Mbit/s``, ``300 kbit/s``); ``metered`` is 0, ``auto`` None."""
    if value == "auto":
        return None
    if value == "metered":
        return 0.0
    match = _LINK.fullmatch(value)
    speed = float(match[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0.0
    if not 1e3 <= speed <= 1e10:
        raise ValueError
    return speed


def duration(value: str) -> float:
    """Parses seconds, alone or with a unit: ``90 s``, ``10 min``, ``1 h``, ``2 d``."""
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        raise ValueError
    return seconds


def period(value: str) -> float:
    """Parses seconds from 1 to a day."""
    found = duration(value)
    if not 1 <= found <= 86400:
        raise ValueError
    return found


def pull_grace(value: str) -> float:
    """Parses seconds from 0 to a day."""
    found = duration(value)
    if not 0 <= found <= 86400:
        raise ValueError
    return found
