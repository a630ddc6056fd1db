"""Parsers of settings: pure functions from text to value, which raise
ValueError for invalid text.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from obdelta.oci.reference import is_host

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)?", re.ASCII)
_SECONDS = {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_QUOTABLE = re.compile(
    r"[!#-\[\]-~]+", re.ASCII
)  # visible ASCII but for the quote and the backslash
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
"""Values of ``jwt-algorithm``."""
PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "::1",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "169.254.0.0/16",
    "100.64.0.0/10",
    "fc00::/7",
    "fe80::/10",
)
"""Loopback, and networks that are not routed in public (RFC 1918, 3927, 6598, 4193, 4291)."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class RegistryUrl:
    """An upstream registry. ``url`` has neither path nor closing slash. ``host`` is ``host[:port]``
    as in image names.
    """

    url: str
    host: str


@dataclass(frozen=True, slots=True)
class OciLayouts:
    """The embedded upstream: a folder of OCI image layouts."""

    path: Path


Upstream = RegistryUrl | OciLayouts


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A Redis server and the login for it. ``repr`` shows no password. Without a user name, the
    password is the default user's.
    """

    host: str
    port: int
    database: int
    username: str | None
    password: str | None = field(repr=False)
    tls: bool


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
        raise ValueError(f"{given.parts[0]} is nobody's home") from error


def paths(value: str) -> tuple[Path, ...]:
    """Parses one path a line."""
    return tuple(path(line) for line in lines(value))


def path_or_pem(value: str) -> Path | bytes:
    """Parses a path and makes it absolute, or decodes a PEM text in base64."""
    compact = "".join(value.split())
    if not compact.startswith(_PEM_IN_BASE64):
        return path(value)
    return base64.b64decode(compact, validate=True)  # binascii.Error is a ValueError


def realm(value: str) -> str:
    """Parses an ``http(s)`` URL that fits into a quoted header parameter."""
    parts = urlsplit(text(value))
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not is_host(parts.netloc)
        or _QUOTABLE.fullmatch(value) is None
    ):
        raise ValueError
    return value


def words(value: str) -> tuple[str, ...]:
    """Parses words of visible ASCII without quotes, separated by blanks or commas. Each word occurs
    once; there is at least one.
    """
    found = tuple(dict.fromkeys(word for word in re.split(r"[\s,]+", value) if word))
    if not found or not all(_QUOTABLE.fullmatch(word) for word in found):
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


def networks(value: str) -> tuple[str, ...]:
    """Parses IP addresses and networks, separated by blanks or commas."""
    found = words(value)
    for network in found:
        ip_network(network)
    return found


def places(value: str) -> tuple[str, ...]:
    """Parses host names, IP addresses and networks, separated by blanks or commas."""
    found = words(value)
    for place in found:
        try:
            ip_network(place)
        except ValueError:
            if not is_host(place) or ":" in place:
                raise
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


def docker_host(value: str) -> str:
    """Parses a Docker engine's address: ``unix://`` and an absolute path, or
    ``tcp://host:port``.
    """
    parts = urlsplit(text(value))
    unix = parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/")
    tcp = parts.scheme == "tcp" and is_host(parts.netloc) and parts.port and parts.path in ("", "/")
    if not (unix or tcp) or parts.query or parts.fragment:
        raise ValueError
    return value if unix else f"tcp://{parts.netloc}"


def docker_yes(value: str) -> bool:
    """Parses Docker's kind of flag: any text means yes, except that ``no`` and
    ``0`` mean no here.
    """
    return text(value).lower() not in ("no", "0", "false")


LEVELS = ("debug", "info", "warn", "error")
AREAS = frozenset(
    [
        "builds",
        "cli",
        "delta",
        "device",
        "face",
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
    """Parses a number from 0 (no delta is worth it) to 10 (every delta is)."""
    number = float(value)
    if not 0 <= number <= 10:  # NaN too
        raise ValueError
    return number


def part(value: str) -> float:
    """Parses a part of a whole: from 0 to less than 1."""
    number = float(value)
    if not 0 <= number < 1:  # NaN too
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


def duration(value: str) -> float:
    """Parses seconds, alone or with a unit: ``90 s``, ``10 min``, ``1 h``, ``2 d``."""
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        raise ValueError
    return seconds


def hosts(value: str) -> frozenset[str]:
    """Parses ``host[:port]`` names, separated by blanks or commas, in lower case."""
    found = frozenset(host.lower() for host in re.split(r"[\s,]+", value) if host)
    if not found or not all(is_host(host) for host in found):
        raise ValueError
    return found


def host(value: str) -> str:
    """Parses one of :func:`hosts`."""
    (found,) = hosts(value)
    return found


def url(value: str) -> str:
    """Parses ``http(s)://host[:port]`` without path, query or user. Returns it in lower case,
    without a closing slash.
    """
    parts = urlsplit(text(value))
    if (
        parts.scheme not in _DEFAULT_PORTS
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
    ):
        raise ValueError
    if not is_host(parts.netloc) or parts.port == 0:
        raise ValueError
    return f"{parts.scheme}://{parts.netloc.lower()}"


def url_host(value: str) -> str:
    """Returns ``host[:port]`` of a result of :func:`url`, as in image names. The scheme's own port
    is left out.
    """
    parts = urlsplit(value)
    own = f":{_DEFAULT_PORTS[parts.scheme]}"
    return parts.netloc.removesuffix(own) if parts.port is not None else parts.netloc


def upstream(value: str) -> Upstream:
    """Parses the URL of a registry, or ``oci:DIR``."""
    if value.startswith("oci:"):
        if not value.removeprefix("oci:"):
            raise ValueError
        return OciLayouts(path(value.removeprefix("oci:")))
    address = url(value)
    return RegistryUrl(address, url_host(address))


def redis_url(value: str) -> RedisUrl:
    """Parses ``redis://[[user]:password@]host[:port][/database]``, or ``rediss://`` for TLS. Parts
    may be percent-encoded.
    """
    parts = urlsplit(text(value))
    if (
        parts.scheme not in ("redis", "rediss")
        or not parts.hostname
        or parts.query
        or parts.fragment
    ):
        raise ValueError
    database = parts.path.removeprefix("/")
    if database and re.fullmatch(r"[0-9]{1,4}", database, re.ASCII) is None:
        raise ValueError
    return RedisUrl(
        host=parts.hostname,
        port=parts.port or 6379,
        database=int(database or 0),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme == "rediss",
    )


def pull_grace(value: str) -> float:
    """Parses seconds from 0 to a day."""
    found = duration(value)
    if not 0 <= found <= 86400:
        raise ValueError
    return found


def lease(value: str) -> float:
    """Parses seconds from 2 to 30."""
    found = duration(value)
    if not 2 <= found <= 30:
        raise ValueError
    return found
