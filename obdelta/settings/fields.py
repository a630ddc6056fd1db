"""The settings themselves. To add one, add a field; a later field's derived default may look at an earlier one's value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from obdelta.cores import available_cores
from obdelta.settings import values
from obdelta.settings.table import ROW, Given, Setting, setting
from obdelta.settings.values import RedisUrl, RegistryUrl, Upstream, url_host

STATE_DIR: Final = "/var/lib/obdelta"
ENGINE_VOLUME: Final = "/var/lib/balena-engine"
RSYNC_VOLUME: Final = "/delta-rsync"
"""The volumes of open-balena-delta."""
MOUNTED_KEY: Final = "/certs/api/certificate"
"""Where open-balena-helm mounts the API's certificate."""


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
    """Where the API's certificate is, or will be."""
    if not (tld := given.env("BALENA_TLD")):
        return None
    usual = f"/certs/private/api.{tld}.pem"
    # open-balena-helm mounts it here, and makes a link of the usual name only once the container runs: too late for a start.
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


def _in_the_place_of_open_balena_delta(given: Given) -> bool:
    """Whether the environment is what open-balena-delta's templates make; nothing else gives a delta server the last of these."""
    return all(given.env(name) for name in ("BALENA_TLD", "DOCKER_HOST", "DOCKER_BUILDKIT"))


def _listen_as_the_peer(given: Given) -> str | None:
    return "tcp:80" if _in_the_place_of_open_balena_delta(given) else None


def _state_as_the_peer(given: Given) -> str | None:
    """In one of its volumes, which outlive a container; what was kept at the usual place before stays in use."""
    if _in_the_place_of_open_balena_delta(given) and not Path(STATE_DIR, "catalogue.sqlite").exists():
        for volume in (ENGINE_VOLUME, RSYNC_VOLUME):
            if os.access(volume, os.W_OK | os.X_OK):
                return f"{volume}/obdelta"
    return None


def _left_by_the_peer(given: Given) -> str | None:
    return RSYNC_VOLUME if _in_the_place_of_open_balena_delta(given) and Path(RSYNC_VOLUME).is_dir() else None


def _cores(_given: Given) -> str:
    return str(available_cores())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Sizes in bytes, times in seconds, paths absolute; ``repr`` shows no secret."""

    listen: tuple[str, ...] = setting(
        values.lines, "Twisted server endpoint strings, one a line", "Twisted server endpoint strings, one a line",
        default="tcp:8080",
        derive=_listen_as_the_peer,
        derive_shown="`tcp:80` [in open-balena-delta's place](#in-the-place-of-open-balena-delta), else `tcp:8080`",
    )  # fmt: skip
    upstream: Upstream = setting(
        values.upstream,
        "the URL of a registry (https://registry.example.com) or oci:DIR",
        "URL of the registry, or `oci:DIR`: a folder of OCI image layouts (the embedded upstream)",
        derive=_upstream_of_openbalena,
        derive_shown="`https://$REGISTRY_HOST`, else `https://registry2.$BALENA_TLD`",
        required=True,
    )
    upstream_ca: Path | None = setting(
        values.path, "the path of a PEM bundle", "PEM bundle that signs the upstream", default_shown="the system's"
    )
    public_url: str = setting(
        values.url,
        "the URL by which devices reach this server, without a path (https://delta.example.com)",
        "how devices reach us; its host:port goes into delta image names",
        derive=_public_url_of_openbalena,
        derive_shown="`https://$DELTA_HOST`, else `https://delta.$BALENA_TLD`",
        required=True,
    )
    registry_hosts: frozenset[str] = setting(
        values.hosts,
        "host names, with :port where it is not the scheme's own, separated by blanks or commas",
        "names under which images may be referred to in `src` and `dest`; any other is refused "
        "(the host that a client names is never connected to)",
        derive=_hosts_of_openbalena,
        derive_shown="the host of `upstream` (of `public-url` when that is `oci:DIR`), `$REGISTRY_HOST`, "
        "`registry.$BALENA_TLD`, `registry2.$BALENA_TLD`",
    )
    state_dir: Path = setting(
        values.path,
        "the path of a folder",
        "everything that is kept",
        default=STATE_DIR,
        derive=_state_as_the_peer,
        derive_shown="[in open-balena-delta's place](#in-the-place-of-open-balena-delta) a folder in one of its volumes, else "
        "`/var/lib/obdelta`",
    )
    upstream_credentials: str = setting(
        values.choice("device", "builder", "none"),
        "device, builder or none",
        "whose token fetches from the upstream: `device` (the asker's own, passed on), `builder` (user `builder`, password "
        "`builder-token`, exchanged at the realm that the upstream names), `none`",
        default="device",
    )
    builder_token: str | None = setting(
        values.text,
        "the builder's token (TOKEN_AUTH_BUILDER_TOKEN), which upstream-credentials = builder needs",
        "the password of `builder`; needed with `upstream-credentials = builder`",
        also=("TOKEN_AUTH_BUILDER_TOKEN",),
        secret=True,
    )
    auth: str = setting(
        values.choice("token", "none"),
        "token or none",
        "`token`: every request needs a token of the API; `none`: everybody may pull everything (must be written out)",
        default="token",
    )
    auth_key: Path | bytes | None = setting(
        values.path_or_pem,
        "the path of the API's public key, or base64 of its PEM text",
        "what tokens are verified with: a file with a PEM certificate or public key or a JSON Web Key Set, read again when it "
        "changes; or base64 of the PEM text",
        also=("TOKEN_AUTH_CERT_PUB",),
        derive=_key_of_openbalena,
        derive_shown="`/certs/private/api.$BALENA_TLD.pem`; `/certs/api/certificate` where only that is there",
    )
    jwt_algorithm: tuple[str, ...] = setting(
        values.algorithms,
        f"one or more of {', '.join(values.ALGORITHMS)} (HS256 and the like would let this server sign tokens)",
        "signature algorithms of tokens",
        default="ES256",
        also=("TOKEN_AUTH_JWT_ALGO", "JWT_ALGO"),
    )
    auth_issuer: str | None = setting(
        values.word,
        "the issuer of tokens (api.example.com)",
        "`iss` of tokens",
        also=("TOKEN_AUTH_CERT_ISSUER", "REGISTRY2_TOKEN_AUTH_ISSUER"),
        derive=_of_tld("api.{}"),
        derive_shown="`api.$BALENA_TLD`",
    )
    auth_audience: tuple[str, ...] | None = setting(
        values.words,
        "the registry's host in tokens (registry2.example.com), several separated by blanks or commas",
        "`aud` of tokens; any of them will do",
        also=("REGISTRY_TOKEN_AUDIENCE",),
        derive=_audience_of_openbalena,
        derive_shown="`$REGISTRY2_HOST`, else `$REGISTRY_HOST`, `registry2.$BALENA_TLD` and `registry.$BALENA_TLD`",
    )
    auth_realm: str | None = setting(
        values.realm,
        "the URL where clients get tokens (https://api.example.com/auth/v1/token)",
        "where clients get tokens",
        also=("REGISTRY2_TOKEN_AUTH_REALM",),
        derive=_of_tld("https://api.{}/auth/v1/token"),
        derive_shown="`https://api.$BALENA_TLD/auth/v1/token`",
    )
    auth_service: str | None = setting(
        values.word,
        "one word, such as registry2.example.com",
        "the service that clients name to the realm",
        derive=_service_of_audience,
        derive_shown="the first `auth-audience`",
    )
    pull_grace: float = setting(
        values.pull_grace,
        "seconds from 0 to 86400, such as 24 h; 0: never",
        "seconds after its expiry for which a token still fetches the rest of a delta whose manifest it fetched before "
        "([long pulls](access.md#pulls-that-outlive-their-token)); 0: never",
        default="24 h",
    )
    operator_listen: tuple[str, ...] = setting(
        values.lines,
        "Twisted server endpoint strings, one a line",
        "where operators' pages and metrics are served, one endpoint a line; never the devices' ones",
        default="tcp:9100:interface=127.0.0.1",
    )
    operator_hosts: frozenset[str] | None = setting(
        values.hosts,
        "host names, separated by blanks or commas",
        "names with a dot by which browsers and scrapers reach `operator-listen`; addresses, `localhost` and names without "
        "a dot are always taken, others are refused ([why](operators.md#who-gets-in))",
    )
    tls_certificate: tuple[Path, ...] | None = setting(
        values.paths,
        "the paths of PEM certificate chains, one a line",
        "PEM certificate chains of `listen`, one a line, chosen by server name, read again when they change; "
        "without, `listen` speaks plain HTTP",
    )
    tls_key: tuple[Path, ...] | None = setting(
        values.paths,
        "the paths of PEM private keys, one a line",
        "their private keys, in the same order",
        default_shown="the certificates' own files",
    )
    proxy_protocol: bool = setting(
        values.yes_no,
        "yes or no",
        "`yes`: every connection to `listen` begins with a PROXY header (version 1 or 2), others are refused",
        default="no",
    )
    proxy_from: tuple[str, ...] = setting(
        values.networks,
        "IP addresses or networks, separated by blanks or commas",
        "proxies that are believed about a client's address: by PROXY header, or by `X-Forwarded-For` where they end TLS",
        default=" ".join(values.PRIVATE_NETWORKS),
        default_shown="loopback and private networks",
    )
    processes: int = setting(
        values.count,
        "a whole number from 1 on",
        "processes that serve `listen`; one of them builds ([scaling](scaling.md))",
        default="1",
    )
    max_connections: int = setting(
        values.limit,
        "a whole number, 0 for no limit",
        "connections from one address at a time",
        default="256",
    )
    max_requests: int = setting(
        values.limit,
        "a whole number, 0 for no limit",
        "requests in flight of one token subject (of one address, where tokens name none) at a time",
        default="64",
    )
    max_queued_builds: int = setting(
        values.limit,
        "a whole number, 0 for no limit",
        "builds that one token subject may have waiting or running at a time; 504 to further ones",
        default="16",
    )
    max_queue: int = setting(
        values.limit,
        "a whole number, 0 for no limit",
        "builds that wait at a time, of all fleets together; half as many of one fleet; 504 to further ones",
        default="1000",
    )
    max_builder_requests: int = setting(
        values.limit,
        "a whole number, 0 for no limit",
        "requests of builders (`wait=true`, with a token that grants nothing) in flight from one client address; "
        "further ones get the target's own name ([builders](access.md#builders))",
        default="16",
    )
    hold: float = setting(
        values.duration,
        "seconds, such as 45",
        "seconds, give or take a tenth, that a request waits for its delta before 502 or 504",
        default="45",
    )
    max_builds: int = setting(
        values.count,
        "a whole number from 1 on",
        "builds at once; the rest queue",
        derive=_cores,
        derive_shown="number of cores, or of those that the CPU quota allows",
    )
    worth: float = setting(
        values.share,
        "a share from 0 to 10, such as 0.9",
        "a delta of more than this share of the full download is not served",
        default="0.9",
    )
    effort: str = setting(
        values.choice("fast", "balanced", "small"),
        "fast, balanced or small",
        "how hard to look for a smaller delta: `fast`, `balanced`, `small`",
        default="balanced",
    )
    builder: tuple[str, ...] = setting(
        values.choices("native", "balena-engine"),
        "native or balena-engine, or both in the order in which they are asked",
        "who builds v3 deltas: `native` (here, without a daemon), `balena-engine` (the one at `docker-host`); with both, the "
        "second is asked where the first cannot",
        default="native",
    )
    docker_host: str = setting(
        values.docker_host,
        "unix:///path or tcp://host:port",
        "the balena-engine that builds (`builder = balena-engine`)",
        default="unix:///var/run/balena-engine.sock",
        also=("DOCKER_HOST",),
    )
    docker_tls_verify: bool = setting(
        values.docker_yes,
        "1, or nothing",
        "whether a `tcp://` engine is spoken to by TLS; it is verified always, and also where only `docker-cert-path` is given",
        default="no",
        also=("DOCKER_TLS_VERIFY",),
    )
    docker_cert_path: Path | None = setting(
        values.path,
        "the path of a folder with ca.pem, cert.pem and key.pem",
        "a folder with `ca.pem` (the engine's authority), `cert.pem` and `key.pem` (ours)",
        also=("DOCKER_CERT_PATH",),
    )
    publish: str = setting(
        values.choice("serve", "registry"),
        "serve or registry",
        "where devices get finished v3 deltas: `serve`: from here; `registry`: from the registry, into which they are pushed "
        "with `builder-token` (without a token where `upstream-credentials = none`)",
        default="serve",
    )
    publish_host: str | None = setting(
        values.host,
        "a host name, with :port where it is not the scheme's own",
        "what devices call the registry that deltas are pushed into",
        derive=_publish_host_of_openbalena,
        derive_shown="`$REGISTRY_HOST`, else the host of `upstream`",
    )
    shared: RedisUrl | None = setting(
        values.redis_url,
        "the URL of a Redis server, such as redis://:password@redis:6379/0 (rediss:// with TLS)",
        "the Redis through which replicas on several machines agree on who builds a pair: "
        "`redis://[[user]:password@]host[:port][/database]`, `rediss://` with TLS ([replicas](scaling.md#replicas))",
        secret=True,
    )
    shared_ca: Path | None = setting(
        values.path, "the path of a PEM bundle", "PEM bundle that signs that Redis", default_shown="the system's"
    )
    shared_lease: float = setting(
        values.lease,
        "seconds from 2 to 30",
        "seconds after which a replica that has fallen silent has lost the pair that it was building to the others",
        default="20",
    )
    delta_rsync: Path | None = setting(
        values.path,
        "the path of a folder",
        "a folder with v2 deltas that an open-balena-delta made: they are served at its URLs to those who may pull their targets",
        derive=_left_by_the_peer,
        derive_shown="`/delta-rsync` [in open-balena-delta's place](#in-the-place-of-open-balena-delta), else none",
    )
    v2_streaming: str = setting(
        values.choice("auto", "never", "padded"),
        "auto, never or padded",
        "`auto`: askers other than supervisors get v2 batches while rsync writes them; `never`: only finished ones; `padded`: "
        "supervisors up to 14.0.24, too, are sent there early, with a length announced that is filled up to",
        default="auto",
    )
    v2_filling: float = setting(
        values.part,
        "a share from 0 to less than 1, such as 0.1",
        "the most of an announced length that may turn out to be filling (with `v2-streaming = padded`)",
        default="0.1",
    )
    v2_url_lifetime: float = setting(
        values.duration,
        "seconds, such as 3600 or 1 h",
        "seconds for which a v2 download URL is good; a device's whole retry window must fit",
        default="3600",
    )
    v2_full_pull: bool = setting(
        values.yes_no,
        "yes or no",
        "`yes`: devices that can have no v2 delta are led to a full pull; `no`: they get an error, and try again",
        default="yes",
    )
    store_quota: int = setting(
        values.size,
        "bytes, such as 20 GiB",
        "bytes that everything kept may take together; what was not used for longest goes first",
        default="20 GiB",
    )
    layer_cache: int | None = setting(
        values.size,
        "bytes, such as 10 GiB",
        "of these, bytes of inflated layers and their indexes",
        default_shown="no limit but `store-quota`",
    )
    tree_cache: int | None = setting(
        values.size,
        "bytes, such as 5 GiB",
        "of these, bytes of unpacked root filesystems (v2)",
        default_shown="no limit but `store-quota`",
    )
    blob_cache: int | None = setting(
        values.size,
        "bytes, such as 5 GiB",
        "of these, bytes of the upstream's blobs, as devices or builds fetched them",
        default_shown="no limit but `store-quota`",
    )
    delta_cache: int | None = setting(
        values.size,
        "bytes, such as 10 GiB",
        "of these, bytes of finished deltas",
        default_shown="no limit but `store-quota`",
    )
    grace: float = setting(
        values.duration,
        "seconds, such as 86400 or 24 h",
        "seconds for which a delta stays after a client fetched it: a device may be pulling it. One that no client has "
        "fetched stays for 10 minutes at most where room is needed",
        default="24 h",
    )
    max_layer: int = setting(
        values.size, "bytes, such as 16 GiB", "bytes that one layer may have when it is inflated", default="16 GiB"
    )
    max_image: int = setting(
        values.size,
        "bytes, such as 32 GiB",
        "bytes that all layers of one image may have together when they are inflated",
        default="32 GiB",
    )
    worker_memory: int = setting(
        values.size, "bytes, such as 1 GiB", "bytes of memory that one build worker may take", default="1 GiB"
    )
    build_timeout: float = setting(
        values.duration, "seconds, such as 1800 or 30 min", "seconds that one build may take", default="1800"
    )
    drain: float = setting(
        values.duration,
        "seconds, such as 30",
        "seconds that running builds and requests get to end after SIGTERM",
        default="30",
    )
    failure_memory: float = setting(
        values.duration,
        "seconds, such as 600 or 10 min",
        "seconds for which a pair that failed is answered with a full pull",
        default="600",
    )
    log_level: Mapping[str, str] = setting(
        values.log_levels,
        "debug, info, warn or error, and the same for areas, such as info, registry=debug",
        "the least important lines that are logged: `debug`, `info`, `warn`, `error`; others by area as in "
        "`info, registry=debug, web.site=warn` ([areas](operators.md#the-log))",
        default="info",
    )
    log_format: str = setting(
        values.choice("text", "json"),
        "text or json",
        "`text`, or `json`: one object a line ([its fields](operators.md#the-log))",
        default="text",
    )
    origins: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Where each key's value came from: ``option``, ``environment NAME``, ``file``, ``derived``, ``default``."""
    texts: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Each key's value as it was written, secrets masked; a key without a value is missing."""

    @property
    def public_host(self) -> str:
        """``host[:port]`` of ``public_url`` for image names; the scheme's own port is left out."""
        return url_host(self.public_url)


def _rows() -> Iterator[Setting]:
    for field in dataclasses.fields(Settings):
        if ROW in field.metadata:
            yield dataclasses.replace(Setting(*field.metadata[ROW]), key=field.name.replace("_", "-"))


_TABLE: Final = tuple(_rows())


def table() -> tuple[Setting, ...]:
    """All settings, in the order in which they are documented and derived."""
    return _TABLE
