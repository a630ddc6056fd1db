"""Where finished deltas go besides the store."""

from __future__ import annotations

from typing import Any

from obdelta.builds.publishing import RegistryPublisher
from obdelta.errors import SettingsError
from obdelta.registry import Credentials, OwnCredentials, Upstream
from obdelta.registry.client import RegistryClient
from obdelta.settings import Settings
from obdelta.wiring.state import Closers, State


def push_credentials(configured: Settings) -> Credentials:
    """What may push everywhere: the builder's token; nothing where the registry is open to all. Raises SettingsError."""
    if configured.builder_token is not None:
        return OwnCredentials.builder(configured.builder_token).own
    if configured.upstream_credentials == "none":
        return OwnCredentials.none().own
    raise SettingsError("builder-token", None, "the builder's token, with which deltas are pushed (publish = registry)")


def make_publisher(
    configured: Settings, reactor: Any, state: State, upstream: Upstream, closers: Closers
) -> RegistryPublisher | None:
    """Who pushes finished deltas into the registry; None where they are served from here. Raises SettingsError."""
    if configured.publish == "serve":
        return None
    if not isinstance(upstream, RegistryClient) or configured.publish_host is None:
        raise SettingsError("publish", configured.publish, "serve, where the upstream is oci:DIR")
    publisher = RegistryPublisher(
        upstream=upstream,
        pusher=upstream.pusher(),
        credentials=push_credentials(configured),
        host=configured.publish_host,
        blobs=state.blobs,
        catalogue=state.catalogue,
        clock=reactor,
    )
    closers.append(publisher.close)
    return publisher
