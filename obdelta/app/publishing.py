"""Wiring of the push: finished deltas go to the registry besides the store."""

from __future__ import annotations

from typing import Any

from obdelta.app.state import Closers, State
from obdelta.builds.publish_image import delta_tag
from obdelta.builds.registry_publisher import RegistryPublisher, registry_tag
from obdelta.errors import SettingsError
from obdelta.registry import Credentials, OwnCredentials, Upstream
from obdelta.registry.client import RegistryClient
from obdelta.settings import Settings


def push_credentials(configured: Settings) -> Credentials:
    """Returns credentials that may push to every repository: the builder's token, or none for an
    open registry. Raises SettingsError.
    """
    if configured.builder_token is not None:
        return OwnCredentials.builder(configured.builder_token).own
    if configured.upstream_credentials == "none":
        return OwnCredentials.none().own
    raise SettingsError(
        "builder-token",
        None,
        "the builder's token, with which deltas are pushed (publish = registry, or shared)",
    )


def make_publisher(
    configured: Settings, reactor: Any, state: State, upstream: Upstream, closers: Closers
) -> RegistryPublisher | None:
    """Returns what pushes finished deltas to the registry, None where only obdelta serves them.
    Raises SettingsError.
    """
    shared = configured.shared is not None
    if configured.publish == "serve" and not shared:
        return None
    if not isinstance(upstream, RegistryClient) or configured.publish_host is None:
        raise SettingsError("publish", configured.publish, "serve, where the upstream is oci:DIR")
    # Replicas that serve deltas themselves find those of the others in the registry, under the name
    # that devices were given.
    serve = configured.publish == "serve"
    publisher = RegistryPublisher(
        upstream=upstream,
        pusher=upstream.pusher(),
        credentials=push_credentials(configured),
        host=configured.public_host if serve else configured.publish_host,
        tag=(lambda pair: delta_tag(pair.key)) if serve else registry_tag,
        others=shared,
        blobs=state.blobs,
        catalogue=state.catalogue,
        clock=reactor,
    )
    closers.append(publisher.close)
    return publisher
