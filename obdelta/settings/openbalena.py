"""Defaults that follow from the environment of openBalena and of open-balena-delta."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from obdelta.settings.address_parsers import RegistryUrl, url_host
from obdelta.settings.setting import DefaultContext

STATE_DIR: Final = "/var/lib/obdelta"
ENGINE_VOLUME: Final = "/var/lib/balena-engine"
RSYNC_VOLUME: Final = "/delta-rsync"
"""The volumes of open-balena-delta."""
MOUNTED_KEY: Final = "/certs/api/certificate"
"""The path where open-balena-helm mounts the API's certificate."""


def upstream_of_openbalena(context: DefaultContext) -> str | None:
    if registry := context.env("REGISTRY_HOST"):
        return f"https://{registry}"
    if tld := context.env("BALENA_TLD"):
        return f"https://registry2.{tld}"
    return None


def public_url_of_openbalena(context: DefaultContext) -> str | None:
    if host := context.env("DELTA_HOST"):
        return f"https://{host}"
    if tld := context.env("BALENA_TLD"):
        return f"https://delta.{tld}"
    return None


def hosts_of_openbalena(context: DefaultContext) -> str | None:
    found = []
    if isinstance(context.values["upstream"], RegistryUrl):
        found.append(context.values["upstream"].host)
    if registry := context.env("REGISTRY_HOST"):
        found.append(registry)
    if tld := context.env("BALENA_TLD"):
        found += [f"registry.{tld}", f"registry2.{tld}"]
    return " ".join(dict.fromkeys(found)) or url_host(context.values["public_url"])


def of_tld(pattern: str) -> Callable[[DefaultContext], str | None]:
    return lambda context: pattern.format(tld) if (tld := context.env("BALENA_TLD")) else None


def key_of_openbalena(context: DefaultContext) -> str | None:
    """Returns the path of the API's certificate, which may not exist yet."""
    if not (tld := context.env("BALENA_TLD")):
        return None
    usual = f"/certs/private/api.{tld}.pem"
    # open-balena-helm mounts the certificate here. It makes a link of the usual name only once the
    # container runs, which is too late for a start.
    return MOUNTED_KEY if not Path(usual).exists() and Path(MOUNTED_KEY).exists() else usual


def audience_of_openbalena(context: DefaultContext) -> str | None:
    if host := context.env("REGISTRY2_HOST"):
        return host
    tld = context.env("BALENA_TLD")
    found = [
        context.env("REGISTRY_HOST"),
        *([f"registry2.{tld}", f"registry.{tld}"] if tld else []),
    ]
    return " ".join(filter(None, found)) or None


def service_of_audience(context: DefaultContext) -> str | None:
    audience = context.values["auth_audience"]
    return audience[0] if audience else None


def publish_host_of_openbalena(context: DefaultContext) -> str | None:
    """Returns the host that devices use for the registry: the upstream's, unless
    ``registry-hosts`` leaves it out.
    """
    if registry := context.env("REGISTRY_HOST"):
        return registry
    upstream, hosts = context.values["upstream"], context.values["registry_hosts"]
    if not isinstance(upstream, RegistryUrl):
        return None
    return upstream.host if upstream.host in hosts else min(hosts)


def _replaces_open_balena_delta(context: DefaultContext) -> bool:
    """Returns whether the environment comes from open-balena-delta's templates. No other deployment
    sets the last variable for a delta server.
    """
    return all(context.env(name) for name in ("BALENA_TLD", "DOCKER_HOST", "DOCKER_BUILDKIT"))


def listen_of_open_balena_delta(context: DefaultContext) -> str | None:
    return "tcp:80" if _replaces_open_balena_delta(context) else None


def state_of_open_balena_delta(context: DefaultContext) -> str | None:
    """Returns a directory in one of open-balena-delta's volumes, which outlive a container. An
    existing catalogue at the usual place stays in use.
    """
    if _replaces_open_balena_delta(context) and not Path(STATE_DIR, "catalogue.sqlite").exists():
        for volume in (ENGINE_VOLUME, RSYNC_VOLUME):
            if os.access(volume, os.W_OK | os.X_OK):
                return f"{volume}/obdelta"
    return None


def v2_deltas_of_open_balena_delta(context: DefaultContext) -> str | None:
    return (
        RSYNC_VOLUME
        if _replaces_open_balena_delta(context) and Path(RSYNC_VOLUME).is_dir()
        else None
    )
