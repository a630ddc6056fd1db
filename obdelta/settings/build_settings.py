"""Settings of builds: limits, builders, publishing, v2 and storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from obdelta.concurrency.cores import available_cores
from obdelta.oci import Form
from obdelta.settings import address_parsers, openbalena, parsers
from obdelta.settings.setting import DefaultContext, setting

_FORMS = {
    form.value: ("" if form is Form.UNIVERSAL else "smaller; ") + f"for {form.traits.readers}"
    for form in Form
}


def _cores(_context: DefaultContext) -> str:
    return str(available_cores())


def _docker_folder(context: DefaultContext) -> str | None:
    over_tcp = context.values["docker_host"].startswith("tcp:")
    return "~/.docker" if over_tcp and context.values["docker_tls_verify"] else None


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Builds of v2 and v3 deltas."""

    request_timeout: float = setting(
        parsers.duration,
        "seconds, such as 45",
        "seconds that a request waits for its delta before it gets 502 or 504; the wait can be"
        " up to a tenth shorter or longer",
        default="45",
        old_key="hold",
    )
    max_builds: int = setting(
        parsers.count,
        "a whole number from 1 on",
        "number of builds that run at the same time; other builds wait in the queue",
        derive=_cores,
        derived_help="number of cores, or of those that the CPU quota allows",
    )
    effort: str = setting(
        parsers.choice("fast", "balanced", "small"),
        "fast, balanced or small",
        "work spent on making deltas smaller: `fast`, `balanced` or `small`",
        default="balanced",
    )
    delta_compression: str = setting(
        parsers.choice("auto", *_FORMS),
        f"auto, {' or '.join(_FORMS)}",
        f"form of v3 deltas: {', '.join(f'`{name}` ({why})' for name, why in _FORMS.items())}, or"
        f" `auto` (all forms); an engine that cannot read the form always gets"
        f" {Form.UNIVERSAL.value}",
        default="auto",
    )
    device_link: float | None = setting(
        parsers.link,
        "a speed, such as 0.5 Mbit/s, or metered, or auto",
        "speed of the devices' links; for a fast link, deltas have more bytes and are applied"
        " sooner; `metered` means as few bytes as possible; `auto` means the speed measured for"
        " each fleet",
        default="0.5 Mbit/s",
    )
    max_delta_ratio: float = setting(
        parsers.share,
        "a share from 0 to 10, such as 0.9",
        "size of the largest delta that is served, as a share of the full download; if a delta is"
        " larger, devices pull in full, unless the update with the delta is faster",
        default="0.9",
        old_key="worth",
    )
    max_image: int = setting(
        parsers.size,
        "bytes, such as 32 GiB",
        "most bytes of all inflated layers of one image; devices pull larger images in full",
        default="32 GiB",
    )
    worker_memory: int = setting(
        parsers.size,
        "bytes, such as 1 GiB",
        "bytes of memory for one worker process, a child process that builds",
        default="1 GiB",
    )
    build_timeout: float = setting(
        parsers.duration,
        "seconds, such as 1800 or 30 min",
        "most seconds for one build, and for one push to the registry; work on layers ends earlier,"
        " after 60 s plus 2 s for each MB of inflated input",
        default="1800",
    )
    drain: float = setting(
        parsers.duration,
        "seconds, such as 30",
        "seconds after SIGTERM in which running builds and requests can finish",
        default="30",
    )


@dataclass(frozen=True, kw_only=True)
class BuilderSettings:
    """The builders of v3 deltas."""

    builder: tuple[str, ...] = setting(
        parsers.choices("native", "balena-engine"),
        "native or balena-engine, or both in the order in which they are tried",
        "builder of v3 deltas: `native` (needs no daemon) or `balena-engine` (at `docker-host`); "
        "if you give both, the second one builds the deltas that the first one cannot build",
        default="native",
    )
    docker_host: str = setting(
        address_parsers.docker_host,
        "unix:///path or tcp://host:port",
        "address of the engine that builds with `builder = balena-engine`; for `tcp://`, Docker's"
        " variables turn on TLS ([how](builders.md#the-connection))",
        default="unix:///var/run/balena-engine.sock",
        variables=("DOCKER_HOST",),
    )
    docker_tls_verify: bool = setting(
        parsers.docker_yes,
        "1, or nothing",
        default="no",
        variables=("DOCKER_TLS_VERIFY",),
        superseded="DOCKER_TLS_VERIFY, Docker's own variable, turns on TLS",
    )
    docker_cert_path: Path | None = setting(
        parsers.path,
        "the path of a directory with ca.pem, cert.pem and key.pem",
        variables=("DOCKER_CERT_PATH",),
        derive=_docker_folder,
        superseded="DOCKER_CERT_PATH, Docker's own variable, turns on TLS",
    )


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """The source of v3 deltas for devices."""

    publish: str = setting(
        parsers.choice("serve", "registry"),
        "serve or registry",
        "where devices pull finished v3 deltas: from this server (`serve`) or from the registry"
        " (`registry`); the server pushes deltas there with `builder-token`, or without a token if"
        " `upstream-credentials = none`",
        default="serve",
    )
    publish_host: str | None = setting(
        address_parsers.host,
        "a host name, with :port where it is not the scheme's own",
        derive=openbalena.publish_host_of_openbalena,
        superseded="it follows from registry-hosts",
    )


@dataclass(frozen=True, kw_only=True)
class V2Settings:
    """v2 deltas."""

    v2_streaming: str = setting(
        parsers.choice("auto", "never", "padded"),
        "auto, never or padded",
        default="auto",
        superseded="each client gets batches as it can read them",
    )
    v2_url_lifetime: float = setting(
        parsers.duration,
        "seconds, such as 3600 or 1 h",
        default="3600",
        superseded="v2 download URLs are valid for an hour",
    )
    v2_full_pull: bool = setting(
        parsers.yes_no,
        "yes or no",
        default="yes",
        superseded="devices that cannot get a v2 delta are sent to a full pull",
    )
    delta_rsync: Path | None = setting(
        parsers.path,
        "the path of a directory",
        "directory with v2 deltas of open-balena-delta; the server serves them at their old URLs,"
        " to clients that may pull the target",
        derive=openbalena.v2_deltas_of_open_balena_delta,
        derived_help=(
            "`/delta-rsync` if it [replaces open-balena-delta](#replacing-open-balena-delta), else"
            " none"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """The quota over everything stored."""

    store_quota: int = setting(
        parsers.size,
        "bytes, such as 20 GiB",
        "bytes for deltas and all caches together; the least recently used content is evicted"
        " first",
        default="20 GiB",
    )
    keep_served: float = setting(
        parsers.duration,
        "seconds, such as 86400 or 24 h",
        "seconds for which a delta stays after a client fetched it, because a device may still be"
        " pulling it; a delta that no client has fetched stays for 10 minutes",
        default="24 h",
        old_key="grace",
    )
