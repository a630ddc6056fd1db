"""Parsers of settings that are addresses: hosts, networks and URLs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obdelta.oci.reference import is_host
from obdelta.settings.parsers import QUOTABLE, path, text, words

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
    """The embedded upstream: a directory of OCI image layouts."""

    path: Path


Upstream = RegistryUrl | OciLayouts


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A Redis server and the login for it. ``repr`` shows no password. Without a user name, the
    password is the default user's. ``ca``: a PEM bundle of the authorities that may sign its
    certificate; None: the system's.
    """

    host: str
    port: int
    database: int
    username: str | None
    password: str | None = field(repr=False)
    tls: bool
    ca: Path | None = None


def realm(value: str) -> str:
    """Parses an ``http(s)`` URL that fits into a quoted header parameter."""
    parts = urlsplit(text(value))
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not is_host(parts.netloc)
        or QUOTABLE.fullmatch(value) is None
    ):
        raise ValueError
    return value


@dataclass(frozen=True, slots=True)
class TrustedNetworks:
    """The addresses of proxies that may state a client's address.

    ``protocol``: each of their connections begins with a PROXY header.
    """

    networks: tuple[str, ...]
    protocol: bool = False


def trusted_networks(value: str) -> TrustedNetworks:
    """Parses IP addresses and networks, with ``proxy-protocol`` before them or alone."""
    first, *others = words(value)
    protocol = first == "proxy-protocol"
    found = tuple(others if protocol else (first, *others))
    for network in found:
        ip_network(network)
    return TrustedNetworks(found or PRIVATE_NETWORKS, protocol)


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """The header by which a proxy names the user that has logged in there.

    ``networks``: where the proxy connects from. ``unix``: it may use a Unix socket.
    """

    header: str
    networks: tuple[str, ...]
    unix: bool


def proxy_header(value: str) -> ProxyHeader:
    """Parses the name of a header and the addresses that may send it."""
    header, *places = words(value)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", header, re.ASCII) or not places:
        raise ValueError
    if header.lower() in ("authorization", "host", "origin", "cookie"):
        raise ValueError(f"browsers send {header} themselves")
    plain = tuple(place for place in places if place != "unix")
    for network in plain:
        ip_network(network)
    return ProxyHeader(header, plain, "unix" in places)


def hosts_and_networks(value: str) -> tuple[str, ...]:
    """Parses host names, IP addresses and networks, separated by blanks or commas."""
    found = words(value)
    for place in found:
        try:
            ip_network(place)
        except ValueError:
            if not is_host(place) or ":" in place:
                raise
    return found


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
    """Parses ``redis://[[user]:password@]host[:port][/database]``, or ``rediss://`` for TLS, which
    may end with ``?ssl_ca_certs=FILE``. Parts may be percent-encoded.
    """
    parts = urlsplit(text(value))
    tls = parts.scheme == "rediss"
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.fragment:
        raise ValueError
    key, _, ca = parts.query.partition("=")
    if parts.query and (key != "ssl_ca_certs" or not ca or "&" in ca or not tls):
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
        tls=tls,
        ca=path(unquote(ca)) if ca else None,
    )
