"""The settings themselves. To add one, add a field; a later field's derived default may look at an earlier one's value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from obdelta.settings import values
from obdelta.settings.table import ROW, Given, Setting, setting
from obdelta.settings.values import RegistryUrl, Upstream, url_host


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


def _cores(_given: Given) -> str:
    return str(len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Sizes in bytes, times in seconds, paths absolute; ``repr`` shows no secret."""

    listen: tuple[str, ...] = setting(
        values.lines, "Twisted server endpoint strings, one a line", "Twisted server endpoint strings, one a line",
        default="tcp:8080",
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
        values.path, "the path of a folder", "everything that is kept", default="/var/lib/obdelta"
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
    hold: float = setting(
        values.duration, "seconds, such as 45", "seconds that a request waits for its delta before 504", default="45"
    )
    max_builds: int = setting(
        values.count,
        "a whole number from 1 on",
        "builds at once; the rest queue",
        derive=_cores,
        derive_shown="number of cores",
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
    layer_cache: int = setting(
        values.size,
        "bytes, such as 10 GiB",
        "bytes of inflated layers and their indexes that are kept",
        default="10 GiB",
    )
    max_layer: int = setting(
        values.size, "bytes, such as 16 GiB", "bytes that one layer may have when it is inflated", default="16 GiB"
    )
    worker_memory: int = setting(
        values.size, "bytes, such as 1 GiB", "bytes of memory that one build worker may take", default="1 GiB"
    )
    build_timeout: float = setting(
        values.duration, "seconds, such as 1800 or 30 min", "seconds that one build may take", default="1800"
    )
    failure_memory: float = setting(
        values.duration,
        "seconds, such as 600 or 10 min",
        "seconds for which a pair that failed is answered with a full pull",
        default="600",
    )
    log_level: str = setting(
        values.choice("debug", "info", "warn", "error"),
        "debug, info, warn or error",
        "the least important lines that are logged: `debug`, `info`, `warn`, `error`",
        default="info",
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
