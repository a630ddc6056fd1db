"""All settings, one field each, with defaults and help texts.

To add a setting, add a field. A derived default may use the values of the fields above it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from obdelta.concurrency.cores import available_cores
from obdelta.settings import parsers
from obdelta.settings.parsers import RedisUrl, RegistryUrl, Upstream, url_host
from obdelta.settings.setting import ROW, Given, Setting, setting

STATE_DIR: Final = "/var/lib/obdelta"
ENGINE_VOLUME: Final = "/var/lib/balena-engine"
RSYNC_VOLUME: Final = "/delta-rsync"
"""The volumes of open-balena-delta."""
MOUNTED_KEY: Final = "/certs/api/certificate"
"""The path where open-balena-helm mounts the API's certificate."""


def _upstream_of_openbalena(given: Given) -> str | None:
    if registry := given.env("REGISTRY_HOST"):
        return f"https://{registry}"
    if tld := given.env("BALENA_TLD"):
        return f"https://registry2.{tld}"
    return None


def _public_url_of_openbalena(given: Given) -> str | None:
    if host := given.env("DELTA_HOST"):
        return f"https://{host}"
    if tld := given.env("BALENA_TLD"):
        return f"https://delta.{tld}"
    return None


def _hosts_of_openbalena(given: Given) -> str | None:
    found = []
    if isinstance(given.values["upstream"], RegistryUrl):
        found.append(given.values["upstream"].host)
    if registry := given.env("REGISTRY_HOST"):
        found.append(registry)
    if tld := given.env("BALENA_TLD"):
        found += [f"registry.{tld}", f"registry2.{tld}"]
    return " ".join(dict.fromkeys(found)) or url_host(given.values["public_url"])


def _of_tld(pattern: str) -> Callable[[Given], str | None]:
    return lambda given: pattern.format(tld) if (tld := given.env("BALENA_TLD")) else None


def _key_of_openbalena(given: Given) -> str | None:
    """Returns the path of the API's certificate, which may not exist yet."""
    if not (tld := given.env("BALENA_TLD")):
        return None
    usual = f"/certs/private/api.{tld}.pem"
    # open-balena-helm mounts the certificate here. It makes a link of the usual name only once the
    # container runs, which is too late for a start.
    return MOUNTED_KEY if not Path(usual).exists() and Path(MOUNTED_KEY).exists() else usual


def _audience_of_openbalena(given: Given) -> str | None:
    if host := given.env("REGISTRY2_HOST"):
        return host
    tld = given.env("BALENA_TLD")
    found = [given.env("REGISTRY_HOST"), *([f"registry2.{tld}", f"registry.{tld}"] if tld else [])]
    return " ".join(filter(None, found)) or None


def _service_of_audience(given: Given) -> str | None:
    audience = given.values["auth_audience"]
    return audience[0] if audience else None


def _publish_host_of_openbalena(given: Given) -> str | None:
    if registry := given.env("REGISTRY_HOST"):
        return registry
    upstream = given.values["upstream"]
    return upstream.host if isinstance(upstream, RegistryUrl) else None


def _replaces_open_balena_delta(given: Given) -> bool:
    """Returns whether the environment comes from open-balena-delta's templates. No other deployment
    sets the last variable for a delta server.
    """
    return all(given.env(name) for name in ("BALENA_TLD", "DOCKER_HOST", "DOCKER_BUILDKIT"))


def _listen_of_open_balena_delta(given: Given) -> str | None:
    return "tcp:80" if _replaces_open_balena_delta(given) else None


def _state_of_open_balena_delta(given: Given) -> str | None:
    """Returns a folder in one of open-balena-delta's volumes, which outlive a container. An
    existing catalogue at the usual place stays in use.
    """
    if _replaces_open_balena_delta(given) and not Path(STATE_DIR, "catalogue.sqlite").exists():
        for volume in (ENGINE_VOLUME, RSYNC_VOLUME):
            if os.access(volume, os.W_OK | os.X_OK):
                return f"{volume}/obdelta"
    return None


def _left_by_the_peer(given: Given) -> str | None:
    return (
        RSYNC_VOLUME if _replaces_open_balena_delta(given) and Path(RSYNC_VOLUME).is_dir() else None
    )


def _cores(_given: Given) -> str:
    return str(available_cores())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Sizes in bytes, times in seconds, absolute paths. ``repr`` shows no
    secret.
    """

    listen: tuple[str, ...] = setting(
        parsers.lines,
        "Twisted server endpoint strings, one a line",
        "Twisted server endpoint strings, one a line",
        default="tcp:8080",
        derive=_listen_of_open_balena_delta,
        derive_shown=(
            "`tcp:80` if it [replaces open-balena-delta](#replacing-open-balena-delta), else "
            "`tcp:8080`"
        ),
    )
    upstream: Upstream = setting(
        parsers.upstream,
        "the URL of a registry (https://registry.example.com) or oci:DIR",
        "URL of the registry that images come from; or `oci:DIR`, a directory of OCI image layouts",
        derive=_upstream_of_openbalena,
        derive_shown="`https://$REGISTRY_HOST`, else `https://registry2.$BALENA_TLD`",
        required=True,
    )
    upstream_ca: Path | None = setting(
        parsers.path,
        "the path of a PEM bundle",
        "PEM bundle of the authorities that may sign the upstream's certificate",
        default_shown="the system's",
    )
    upstream_basic: bool = setting(
        parsers.yes_no,
        "yes or no",
        "`yes`: the upstream itself gets `builder-token` if it asks for Basic authentication; `no`:"
        " only token servers do",
        default="no",
    )
    upstream_redirects: tuple[str, ...] | None = setting(
        parsers.places,
        "host names, IP addresses or networks, separated by blanks or commas",
        "hosts with loopback, link-local or private addresses to which the upstream may lead,"
        " besides those of its own kind ([details](upstream.md#where-the-upstream-may-lead))",
    )
    token_realms: frozenset[str] | None = setting(
        parsers.hosts,
        "host names, with :port where only that port is meant, separated by blanks or commas",
        "hosts of token servers that may get `builder-token`, besides those of `upstream` and"
        " `auth-realm`",
    )
    public_url: str = setting(
        parsers.url,
        "the URL by which devices reach this server, without a path (https://delta.example.com)",
        "URL by which devices reach this server; delta image names contain its host and port",
        derive=_public_url_of_openbalena,
        derive_shown="`https://$DELTA_HOST`, else `https://delta.$BALENA_TLD`",
        required=True,
    )
    registry_hosts: frozenset[str] = setting(
        parsers.hosts,
        "host names, with :port where it is not the scheme's own, separated by blanks or commas",
        "registry hosts that `src` and `dest` may name; other hosts are refused; the server never"
        " connects to the host that a client names",
        derive=_hosts_of_openbalena,
        derive_shown=(
            "the host of `upstream` (for `oci:DIR` of `public-url`), `$REGISTRY_HOST`, "
            "`registry.$BALENA_TLD`, `registry2.$BALENA_TLD`"
        ),
    )
    state_dir: Path = setting(
        parsers.path,
        "the path of a folder",
        "directory for everything that the server keeps ([state](state.md))",
        default=STATE_DIR,
        derive=_state_of_open_balena_delta,
        derive_shown=(
            "a directory in a volume of open-balena-delta if it [replaces "
            "open-balena-delta](#replacing-open-balena-delta), else `/var/lib/obdelta`"
        ),
    )
    upstream_credentials: str = setting(
        parsers.choice("device", "builder", "none"),
        "device, builder or none",
        "credentials for the upstream: `device` (the client's own token), `builder` (a token for "
        "user `builder`, password `builder-token`), or `none`",
        default="device",
    )
    builder_token: str | None = setting(
        parsers.text,
        "the builder's token (TOKEN_AUTH_BUILDER_TOKEN), which upstream-credentials = builder"
        " needs",
        "password of the user `builder`; required with `upstream-credentials = builder`",
        also=("TOKEN_AUTH_BUILDER_TOKEN",),
        secret=True,
    )
    auth: str = setting(
        parsers.choice("token", "none"),
        "token or none",
        "`token`: every request needs a token of the API; `none`: everybody may pull everything "
        "(must be set explicitly)",
        default="token",
    )
    auth_key: Path | bytes | None = setting(
        parsers.path_or_pem,
        "the path of the API's public key, or base64 of its PEM text",
        "key that verifies tokens: a file with a PEM certificate, PEM public key or JSON Web Key "
        "Set (read again when it changes), or base64 of PEM text",
        also=("TOKEN_AUTH_CERT_PUB",),
        derive=_key_of_openbalena,
        derive_shown=(
            "`/certs/private/api.$BALENA_TLD.pem`; `/certs/api/certificate` if only that exists"
        ),
    )
    jwt_algorithm: tuple[str, ...] = setting(
        parsers.algorithms,
        f"one or more of {', '.join(parsers.ALGORITHMS)} (HS256 and the like would let this server"
        " sign tokens)",
        "allowed signature algorithms of tokens",
        default="ES256",
        also=("TOKEN_AUTH_JWT_ALGO", "JWT_ALGO"),
    )
    auth_issuer: str | None = setting(
        parsers.word,
        "the issuer of tokens (api.example.com)",
        "required claim `iss` of tokens",
        also=("TOKEN_AUTH_CERT_ISSUER", "REGISTRY2_TOKEN_AUTH_ISSUER"),
        derive=_of_tld("api.{}"),
        derive_shown="`api.$BALENA_TLD`",
    )
    auth_audience: tuple[str, ...] | None = setting(
        parsers.words,
        "the registry's host in tokens (registry2.example.com), several separated by blanks or"
        " commas",
        "allowed values of the claim `aud` of tokens; one must match",
        also=("REGISTRY_TOKEN_AUDIENCE",),
        derive=_audience_of_openbalena,
        derive_shown=(
            "`$REGISTRY2_HOST`, else `$REGISTRY_HOST`, `registry2.$BALENA_TLD` and"
            " `registry.$BALENA_TLD`"
        ),
    )
    auth_realm: str | None = setting(
        parsers.realm,
        "the URL where clients get tokens (https://api.example.com/auth/v1/token)",
        "URL where clients get tokens",
        also=("REGISTRY2_TOKEN_AUTH_REALM",),
        derive=_of_tld("https://api.{}/auth/v1/token"),
        derive_shown="`https://api.$BALENA_TLD/auth/v1/token`",
    )
    auth_service: str | None = setting(
        parsers.word,
        "one word, such as registry2.example.com",
        "service that clients name when they ask the realm for a token",
        derive=_service_of_audience,
        derive_shown="the first `auth-audience`",
    )
    pull_grace: float = setting(
        parsers.pull_grace,
        "seconds from 0 to 86400, such as 24 h; 0: never",
        "seconds after its expiry in which a token may still finish the pull of a delta that it "
        "began ([long pulls](access.md#pulls-that-outlive-their-token)); 0: none",
        default="24 h",
    )
    operator_listen: tuple[str, ...] = setting(
        parsers.lines,
        "Twisted server endpoint strings, one a line",
        "endpoints of the operators' pages and metrics, one a line; they must differ from `listen`",
        default="tcp:9100:interface=127.0.0.1",
    )
    operator_hosts: frozenset[str] | None = setting(
        parsers.hosts,
        "host names, separated by blanks or commas",
        "further host names allowed at `operator-listen`; IP addresses, `localhost` and names "
        "without a dot are always allowed ([why](operators.md#who-gets-in))",
    )
    tls_certificate: tuple[Path, ...] | None = setting(
        parsers.paths,
        "the paths of PEM certificate chains, one a line",
        "PEM certificate chains for `listen`, one file a line, chosen by server name and read "
        "again when they change; without it `listen` uses plain HTTP",
    )
    tls_key: tuple[Path, ...] | None = setting(
        parsers.paths,
        "the paths of PEM private keys, one a line",
        "private keys of these certificates, in the same order",
        default_shown="the certificates' own files",
    )
    proxy_protocol: bool = setting(
        parsers.yes_no,
        "yes or no",
        "`yes`: every connection to `listen` must begin with a PROXY header (version 1 or 2);"
        " others are refused",
        default="no",
    )
    proxy_from: tuple[str, ...] = setting(
        parsers.networks,
        "IP addresses or networks, separated by blanks or commas",
        "proxies that may state a client's address: in a PROXY header, or in `X-Forwarded-For` if"
        " they end TLS",
        default=" ".join(parsers.PRIVATE_NETWORKS),
        default_shown="loopback and private networks",
    )
    processes: int = setting(
        parsers.count,
        "a whole number from 1 on",
        "server processes for `listen`; one of them builds",
        default="1",
    )
    max_connections: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "connections from one address at a time",
        default="256",
    )
    max_requests: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "requests in flight of one token subject, or of one address if the token has no subject",
        default="64",
    )
    max_queued_builds: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "waiting and running builds of one token subject; further requests get 504",
        default="16",
    )
    max_queue: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "waiting builds of all fleets together, half as many of one fleet; further requests"
        " get 504",
        default="1000",
    )
    max_builder_requests: int = setting(
        parsers.limit,
        "a whole number, 0 for no limit",
        "requests of builders (`wait=true`, with a token that grants nothing) in flight from one "
        "address; others get the target's own name ([builders](access.md#builders))",
        default="16",
    )
    hold: float = setting(
        parsers.duration,
        "seconds, such as 45",
        "seconds, plus or minus a tenth, that a request waits for its delta before it gets 502"
        " or 504",
        default="45",
    )
    max_builds: int = setting(
        parsers.count,
        "a whole number from 1 on",
        "builds that run at the same time; others wait in the queue",
        derive=_cores,
        derive_shown="number of cores, or of those that the CPU quota allows",
    )
    worth: float = setting(
        parsers.share,
        "a share from 0 to 10, such as 0.9",
        "largest delta that is served, as a share of the full download; for larger ones devices"
        " pull in full",
        default="0.9",
    )
    effort: str = setting(
        parsers.choice("fast", "balanced", "small"),
        "fast, balanced or small",
        "work spent on making deltas smaller: `fast`, `balanced` or `small`",
        default="balanced",
    )
    builder: tuple[str, ...] = setting(
        parsers.choices("native", "balena-engine"),
        "native or balena-engine, or both in the order in which they are asked",
        "builder of v3 deltas: `native` (needs no daemon) or `balena-engine` (at `docker-host`); "
        "if both are given, the second builds what the first cannot",
        default="native",
    )
    docker_host: str = setting(
        parsers.docker_host,
        "unix:///path or tcp://host:port",
        "balena-engine that builds, with `builder = balena-engine`",
        default="unix:///var/run/balena-engine.sock",
        also=("DOCKER_HOST",),
    )
    docker_tls_verify: bool = setting(
        parsers.docker_yes,
        "1, or nothing",
        "TLS for a `tcp://` engine; also on if `docker-cert-path` is set; the certificate is always"
        " verified",
        default="no",
        also=("DOCKER_TLS_VERIFY",),
    )
    docker_cert_path: Path | None = setting(
        parsers.path,
        "the path of a folder with ca.pem, cert.pem and key.pem",
        "directory with `ca.pem` (the engine's authority), and this server's `cert.pem` and"
        " `key.pem`",
        also=("DOCKER_CERT_PATH",),
    )
    publish: str = setting(
        parsers.choice("serve", "registry"),
        "serve or registry",
        "where devices pull finished v3 deltas: `serve`: from this server; `registry`: from the "
        "registry; they are pushed with `builder-token`, or with no token if "
        "`upstream-credentials = none`",
        default="serve",
    )
    publish_host: str | None = setting(
        parsers.host,
        "a host name, with :port where it is not the scheme's own",
        "host that devices use for the registry to which deltas are pushed",
        derive=_publish_host_of_openbalena,
        derive_shown="`$REGISTRY_HOST`, else the host of `upstream`",
    )
    shared: RedisUrl | None = setting(
        parsers.redis_url,
        "the URL of a Redis server, such as redis://:password@redis:6379/0 (rediss:// with TLS)",
        "URL of the Redis for replicas on several machines: "
        "`redis://[[user]:password@]host[:port][/database]`, or `rediss://` for TLS "
        "([replicas](scaling.md#replicas))",
        secret=True,
    )
    shared_ca: Path | None = setting(
        parsers.path,
        "the path of a PEM bundle",
        "PEM bundle of the authorities that may sign the certificate of Redis",
        default_shown="the system's",
    )
    shared_lease: float = setting(
        parsers.lease,
        "seconds from 2 to 30",
        "seconds without a sign of life after which another replica takes over a build",
        default="20",
    )
    delta_rsync: Path | None = setting(
        parsers.path,
        "the path of a folder",
        "directory with v2 deltas of open-balena-delta, served at their old URLs to clients that"
        " may pull the target",
        derive=_left_by_the_peer,
        derive_shown=(
            "`/delta-rsync` if it [replaces open-balena-delta](#replacing-open-balena-delta), else"
            " none"
        ),
    )
    v2_streaming: str = setting(
        parsers.choice("auto", "never", "padded"),
        "auto, never or padded",
        "`auto`: clients other than supervisors get v2 batches while rsync writes; `never`: all "
        "wait for the proof; `padded`: as `auto`, and supervisors up to 14.0.24 get padded "
        "batches early",
        default="auto",
    )
    v2_filling: float = setting(
        parsers.part,
        "a share from 0 to less than 1, such as 0.1",
        "largest share of padding in an announced length, with `v2-streaming = padded`",
        default="0.1",
    )
    v2_url_lifetime: float = setting(
        parsers.duration,
        "seconds, such as 3600 or 1 h",
        "seconds for which a v2 download URL is valid; all retries of a device must fit into this"
        " time",
        default="3600",
    )
    v2_full_pull: bool = setting(
        parsers.yes_no,
        "yes or no",
        "`yes`: devices that cannot get a v2 delta are sent to a full pull; `no`: they get an error"
        " and retry",
        default="yes",
    )
    store_quota: int = setting(
        parsers.size,
        "bytes, such as 20 GiB",
        "bytes for deltas and all caches together; the least recently used go first",
        default="20 GiB",
    )
    layer_cache: int | None = setting(
        parsers.size,
        "bytes, such as 10 GiB",
        "bytes for inflated layers and their indexes, within `store-quota`",
        default_shown="only `store-quota`",
    )
    tree_cache: int | None = setting(
        parsers.size,
        "bytes, such as 5 GiB",
        "bytes for unpacked root filesystems (v2), within `store-quota`",
        default_shown="only `store-quota`",
    )
    blob_cache: int | None = setting(
        parsers.size,
        "bytes, such as 5 GiB",
        "bytes for blobs fetched from the upstream, within `store-quota`",
        default_shown="only `store-quota`",
    )
    delta_cache: int | None = setting(
        parsers.size,
        "bytes, such as 10 GiB",
        "bytes for finished deltas, within `store-quota`",
        default_shown="only `store-quota`",
    )
    grace: float = setting(
        parsers.duration,
        "seconds, such as 86400 or 24 h",
        "seconds for which a delta stays after a client fetched it, because a device may still be"
        " pulling it; unfetched deltas stay for at most 10 minutes if room is needed",
        default="24 h",
    )
    max_layer: int = setting(
        parsers.size,
        "bytes, such as 16 GiB",
        "bytes of one inflated layer; images with larger ones are pulled in full",
        default="16 GiB",
    )
    max_image: int = setting(
        parsers.size,
        "bytes, such as 32 GiB",
        "bytes of all inflated layers of one image; larger images are pulled in full",
        default="32 GiB",
    )
    worker_memory: int = setting(
        parsers.size,
        "bytes, such as 1 GiB",
        "bytes of memory for one build worker",
        default="1 GiB",
    )
    build_timeout: float = setting(
        parsers.duration,
        "seconds, such as 1800 or 30 min",
        "most seconds for one step of a build; work on layers ends earlier, after 60 s plus 2 s a"
        " MB of inflated input",
        default="1800",
    )
    drain: float = setting(
        parsers.duration,
        "seconds, such as 30",
        "seconds after SIGTERM in which running builds and requests may end",
        default="30",
    )
    failure_memory: float = setting(
        parsers.duration,
        "seconds, such as 600 or 10 min",
        "seconds for which a failed pair is answered with a full pull",
        default="600",
    )
    log_level: Mapping[str, str] = setting(
        parsers.log_levels,
        "debug, info, warn or error, and the same for areas, such as info, registry=debug",
        "lowest level that is logged: `debug`, `info`, `warn` or `error`; levels for areas as in "
        "`info, registry=debug, web.devices.app=warn` ([areas](operators.md#the-log))",
        default="info",
    )
    log_format: str = setting(
        parsers.choice("text", "json"),
        "text or json",
        "`text`, or `json` for one object a line ([its fields](operators.md#the-log))",
        default="text",
    )
    origins: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """The source of each key's value: ``option``, ``environment NAME``, ``file``, ``derived``,
    ``default``.
    """
    texts: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Each key's value as written, with secrets masked. A key without a value is missing."""

    @property
    def public_host(self) -> str:
        """Returns ``host[:port]`` of ``public_url`` for image names, without
        the scheme's own port.
        """
        return url_host(self.public_url)


def _rows() -> Iterator[Setting]:
    for field in dataclasses.fields(Settings):
        if ROW in field.metadata:
            yield dataclasses.replace(
                Setting(*field.metadata[ROW]), key=field.name.replace("_", "-")
            )


_TABLE: Final = tuple(_rows())


def table() -> tuple[Setting, ...]:
    """Returns all settings, in the order in which they are documented and derived."""
    return _TABLE
