"""Wiring of the publishers, which push finished deltas to the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from obdelta.app.access import push_target
from obdelta.app.components import Components
from obdelta.builds.publish.batch_publisher import BatchPublisher
from obdelta.builds.publish.publish_image import delta_tag
from obdelta.builds.publish.registry_publisher import RegistryPublisher, registry_tag
from obdelta.builds.publish.registry_pushes import PushParts
from obdelta.registry.client import RegistryClient
from obdelta.store.catalogue.records import Kind


@dataclass(frozen=True, slots=True)
class Publishers:
    """The publishers of finished deltas to the registry; None if this server alone serves."""

    images: RegistryPublisher | None = None
    batches: BatchPublisher | None = None

    @property
    def by_kind(self) -> Mapping[Kind, RegistryPublisher | BatchPublisher]:
        """The publisher of each kind of delta that is pushed."""
        found: dict[Kind, RegistryPublisher | BatchPublisher] = {}
        if self.images is not None:
            found["v3"] = self.images
        if self.batches is not None:
            found["v2"] = self.batches
        return found


def make_publishers(parts: Components) -> Publishers:
    """Returns the publishers of finished deltas to the registry. Raises SettingsError."""
    configured, target = parts.settings, push_target(parts.settings)
    if target is None:
        return Publishers()
    host, credentials = target
    upstream = cast(RegistryClient, parts.upstream)  # there is no target in layouts
    # Replicas that serve deltas themselves find those of the others in the registry, under the name
    # that devices were given.
    serve = configured.publish == "serve"
    pushes = PushParts(
        upstream=upstream,
        pusher=upstream.pusher(),
        credentials=credentials,
        blobs=parts.state.blobs,
        catalogue=parts.state.catalogue,
        clock=parts.reactor,
    )
    images = RegistryPublisher(
        pushes,
        host=configured.public_host if serve else host,
        tag=(lambda pair: delta_tag(pair.key)) if serve else registry_tag,
        others=configured.shared is not None,
    )
    batches = BatchPublisher(pushes, host=host)
    for publisher in (images, batches):
        parts.services.add_stop(publisher.close)
    return Publishers(images, batches)
