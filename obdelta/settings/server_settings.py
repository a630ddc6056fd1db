"""Settings of the server: upstream, addresses, access, TLS, operators, replicas and limits.

Each section is one class. A derived default may use the values of the fields above it, and those of
the sections before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from obdelta.settings import address_parsers, openbalena, parsers
from obdelta.settings.address_parsers import ProxyHeader, RedisUrl, TrustedNetworks, Upstream
from obdelta.settings.setting import DefaultContext, setting


def _quarter_of_requests(context: DefaultContext) -> str:
    """Returns a quarter of ``max-requests``; of its default, if that has no limit."""
    return str(-(-(context.values["max_requests"] or 64) // 4))


def _basic_of_credentials(context: DefaultContext) -> str:
    return "yes" if context.values["upstream_credentials"] == "basic" else "no"


def _ca_of_shared(context: DefaultContext) -> str | None:
    shared = context.values["shared"]
    return None if shared is None or shared.ca is None else str(shared.ca)


def _protocol_of_proxies(context: DefaultContext) -> str:
    return "yes" if context.values["proxy_from"].protocol else "no"


@dataclass(frozen=True, kw_only=True)
class UpstreamSettings:
    """The registry that images come from."""

    upstream: Upstream = setting(
        address_parsers.upstream,
        "the URL of a registry (https://registry.example.com), without a path, or oci:DIR",
        "URL of the registry that images come from, or `oci:DIR`, a directory of OCI image layouts",
        derive=openbalena.upstream_of_openbalena,
        derived_help="`https://$REGISTRY_HOST`, else `https://registry2.$BALENA_TLD`",
        required=True,
    )
    upstream_ca: Path | None = setting(
        parsers.path,
        "the path of a PEM bundle",
        "PEM bundle of the authorities that may sign the upstream's certificate",
        default_help="the system's",
    )
    upstream_redirects: tuple[str, ...] | None = setting(
        address_parsers.hosts_and_networks,
        "host names, IP addresses or networks, separated by blanks or commas",
        "further hosts with loopback, link-local or private addresses to which the upstream may"
        " send this server ([details](upstream.md#where-the-upstream-may-lead))",
    )
    upstream_credentials: str = setting(
        parsers.choice("device", "builder", "basic", "none"),
        "device, builder, basic or none",
        "credentials for the upstream: `device` (the client's token), `builder` (a token that user"
        " `builder` gets with the password `builder-token`), `basic` (the upstream itself may also"
        " get this password), or `none`",
        default="device",
    )
    builder_token: str | None = setting(
        parsers.text,
        "the builder's token (TOKEN_AUTH_BUILDER_TOKEN), which upstream-credentials = builder"
        " or basic needs",
        "password of the user `builder`; `upstream-credentials = builder` and `basic` need it",
        variables=("TOKEN_AUTH_BUILDER_TOKEN",),
        secret=True,
    )
    upstream_basic: bool = setting(
        parsers.yes_no,
        "yes or no",
        derive=_basic_of_credentials,
        superseded="upstream-credentials = basic sends builder-token to the upstream itself",
    )
    token_realms: frozenset[str] | None = setting(
        address_parsers.hosts,
        "host names, with :port where only that port is meant, separated by blanks or commas",
        "hosts of token servers that may get `builder-token`, besides those of `upstream` and"
        " `auth-realm`",
    )


@dataclass(frozen=True, kw_only=True)
class AddressSettings:
    """The server's addresses, and the directory of its files."""

    listen: tuple[str, ...] = setting(
        parsers.lines,
        "Twisted server endpoint strings, one a line",
        "Twisted server endpoint strings, one a line",
        default="tcp:8080",
        derive=openbalena.listen_of_open_balena_delta,
        derived_help=(
            "`tcp:80` if obdelta [replaces open-balena-delta](#replacing-open-balena-delta), else"
            " `tcp:8080`"
        ),
    )
    public_url: str = setting(
        address_parsers.url,
        "the URL by which devices reach this server, without a path (https://delta.example.com)",
        "URL by which devices reach this server; names of delta images contain its host and port",
        derive=openbalena.public_url_of_openbalena,
        derived_help="`https://$DELTA_HOST`, else `https://delta.$BALENA_TLD`",
        required=True,
    )
    registry_hosts: frozenset[str] = setting(
        address_parsers.hosts,
        "host names, with :port where it is not the scheme's own, separated by blanks or commas",
        "registry hosts that clients may name in `src` and `dest`; other hosts are refused; the"
        " server never connects to a host because a client names it",
        derive=openbalena.hosts_of_openbalena,
        derived_help=(
            "the host of `upstream` (for `oci:DIR` of `public-url`), `$REGISTRY_HOST`, "
            "`registry.$BALENA_TLD`, `registry2.$BALENA_TLD`"
        ),
    )
    state_dir: Path = setting(
        parsers.path,
        "the path of a directory",
        "directory for everything that the server keeps ([state](state.md))",
        default=openbalena.STATE_DIR,
        derive=openbalena.state_of_open_balena_delta,
        derived_help=(
            "a directory in a volume of open-balena-delta if obdelta [replaces "
            "open-balena-delta](#replacing-open-balena-delta), else `/var/lib/obdelta`"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Verification of clients' tokens."""

    auth: str = setting(
        parsers.choice("token", "none"),
        "token or none",
        "with `token`, every request needs a token of the API; with `none`, anyone may pull"
        " everything (`none` must be set explicitly)",
        default="token",
    )
    auth_key: Path | bytes | None = setting(
        parsers.path_or_pem,
        "the path of the API's public key, or base64 of its PEM text",
        "key that verifies tokens: a file with a PEM certificate, PEM public key or JSON Web Key "
        "Set, or base64 of PEM text; when the file changes, the server reads it again",
        variables=("TOKEN_AUTH_CERT_PUB",),
        derive=openbalena.key_of_openbalena,
        derived_help=(
            "`/certs/private/api.$BALENA_TLD.pem`; `/certs/api/certificate` if only that exists"
        ),
    )
    jwt_algorithm: tuple[str, ...] = setting(
        parsers.algorithms,
        f"one or more of {', '.join(parsers.ALGORITHMS)} (HS256 and the like would let this server"
        " sign tokens)",
        default=" ".join(parsers.ALGORITHMS),
        variables=("TOKEN_AUTH_JWT_ALGO", "JWT_ALGO"),
        superseded="the type of auth-key decides",
    )
    auth_issuer: str | None = setting(
        parsers.word,
        "the issuer of tokens (api.example.com)",
        "required claim `iss` of tokens",
        variables=("TOKEN_AUTH_CERT_ISSUER", "REGISTRY2_TOKEN_AUTH_ISSUER"),
        derive=openbalena.of_tld("api.{}"),
        derived_help="`api.$BALENA_TLD`",
    )
    auth_audience: tuple[str, ...] | None = setting(
        parsers.words,
        "the registry's host in tokens (registry2.example.com), several separated by blanks or"
        " commas",
        "allowed values of the claim `aud` of tokens; a token must have one of these values",
        variables=("REGISTRY_TOKEN_AUDIENCE",),
        derive=openbalena.audience_of_openbalena,
        derived_help=(
            "`$REGISTRY2_HOST`, else `$REGISTRY_HOST`, `registry2.$BALENA_TLD` and"
            " `registry.$BALENA_TLD`"
        ),
    )
    auth_service: str | None = setting(
        parsers.word,
        "one word, such as registry2.example.com",
        derive=openbalena.service_of_audience,
        superseded="clients get the first auth-audience",
    )
    auth_realm: str | None = setting(
        address_parsers.realm,
        "the URL where clients get tokens (https://api.example.com/auth/v1/token)",
        "URL where clients get tokens",
        variables=("REGISTRY2_TOKEN_AUTH_REALM",),
        derive=openbalena.of_tld("https://api.{}/auth/v1/token"),
        derived_help="`https://api.$BALENA_TLD/auth/v1/token`",
    )
    pull_grace: float = setting(
        parsers.pull_grace,
        "seconds from 0 to 86400, such as 24 h; 0: never",
        "seconds for which an expired token may still finish a pull that it began ([long "
        "pulls](access.md#pulls-that-outlive-their-token)); with 0, such a pull is refused",
        default="24 h",
    )


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """TLS, and proxies before the server."""

    tls_certificate: tuple[Path, ...] | None = setting(
        parsers.paths,
        "the paths of PEM certificate chains, one a line",
        "PEM certificate chains for `listen`, one file a line; a client's server name selects a"
        " chain; changed files are read again; without this setting, `listen` uses plain HTTP",
    )
    tls_key: tuple[Path, ...] | None = setting(
        parsers.paths,
        "the paths of PEM private keys, one a line",
        "private keys of the certificates in `tls-certificate`, in the same order",
        default_help="the certificates' own files",
    )
    proxy_from: TrustedNetworks = setting(
        address_parsers.trusted_networks,
        "IP addresses or networks, separated by blanks or commas, and before them proxy-protocol"
        " where each connection begins with a PROXY header",
        "IP addresses or networks of the proxies that may state a client's address in"
        " `X-Forwarded-For`; if `proxy-protocol` is the first word, every connection to"
        " `listen` must begin with a PROXY header ([details](tls.md#haproxy-passes-tls-through))",
        default=" ".join(address_parsers.PRIVATE_NETWORKS),
        default_help="loopback and private networks",
    )
    proxy_protocol: bool = setting(
        parsers.yes_no,
        "yes or no",
        derive=_protocol_of_proxies,
        superseded="proxy-from begins with the word proxy-protocol instead",
    )


@dataclass(frozen=True, kw_only=True)
class OperatorSettings:
    """The operators' endpoint, and the log."""

    operator_listen: tuple[str, ...] = setting(
        parsers.lines,
        "Twisted server endpoint strings, one a line",
        "endpoints of the operators' pages and metrics, one a line; they must differ from `listen`",
        default="tcp:9100:interface=127.0.0.1",
    )
    operator_hosts: frozenset[str] | None = setting(
        address_parsers.hosts,
        "host names, separated by blanks or commas",
        "further host names allowed at `operator-listen`; IP addresses, `localhost` and names "
        "without a dot are always allowed ([why](operators.md#port-9100-and-who-gets-in))",
    )
    operator_passwords: Path | None = setting(
        parsers.path,
        "the path of a file with lines that obdelta password prints",
        "file of the users who may act ([how](operators.md#acting)): one line of `obdelta password`"
        " for each user; a changed file is read again; if neither this setting nor"
        " `operator-proxy` is set, only commands on this machine may act",
    )
    operator_proxy: ProxyHeader | None = setting(
        address_parsers.proxy_header,
        "the name of a header, then the IP addresses or networks that may send it, such as"
        " X-Forwarded-User 127.0.0.1",
        "header in which a proxy with a login names the user, who may then act, and the proxy's IP"
        " addresses or networks; `unix` stands for a proxy that connects by a Unix socket",
    )
    log_level: Mapping[str, str] = setting(
        parsers.log_levels,
        "debug, info, warn or error, and the same for areas, such as info, registry=debug",
        "lowest level that is logged: `debug`, `info`, `warn` or `error`; an area can have a level"
        " of its own: `info, registry=debug, web.devices.app=warn` ([areas](operators.md#the-log))",
        default="info",
    )
    log_format: str = setting(
        parsers.choice("text", "json"),
        "text or json",
        "format of the log: `text`, or `json`, one object a line ([fields](operators.md#the-log))",
        default="text",
    )


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """Server processes, and replicas on several machines."""

    processes: int = setting(
        parsers.count,
        "a whole number from 1 on",
        "number of server processes for `listen`; one of them also builds",
        default="1",
    )
    shared: RedisUrl | None = setting(
        address_parsers.redis_url,
        "the URL of a Redis server, such as redis://:password@redis:6379/0 (rediss:// with TLS)",
        "URL of the Redis that replicas share ([replicas](scaling.md#replicas)): "
        "`redis://[[user]:password@]host[:port][/database]`, or `rediss://…` for TLS; with TLS,"
        " `?ssl_ca_certs=FILE` at the URL's end names the file of the trusted authorities",
        secret=True,
    )
    builds: str = setting(
        parsers.choice("here", "workers"),
        "here or workers",
        "where deltas are built: `here` means in this server, `workers` means in any `obdelta"
        " worker` with the same `shared` and registry ([workers](scaling.md#workers))",
        default="here",
    )
    shared_ca: Path | None = setting(
        parsers.path,
        "the path of a PEM bundle",
        derive=_ca_of_shared,
        superseded="shared has it after ?ssl_ca_certs=",
    )


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """Limits on what one client uses at a time."""

    max_connections: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "number of connections that one address may have at a time",
        default="256",
    )
    max_requests: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "requests that one client (a token's subject, else an address) may have at a time; for a"
        " client's builds, and for builders' requests from one address, the limit is a quarter",
        default="64",
    )
    max_queued_builds: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        derive=_quarter_of_requests,
        superseded="it is a quarter of max-requests",
    )
    max_builder_requests: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        derive=_quarter_of_requests,
        superseded="it is a quarter of max-requests",
    )
