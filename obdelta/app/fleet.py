"""Wiring of the fleet: openBalena's API, the watcher of releases, and pruning."""

from __future__ import annotations

import time
from dataclasses import dataclass

from obdelta.app.access import own_credentials
from obdelta.app.components import Components
from obdelta.builds.prebuild import PrebuildLists
from obdelta.delta.build import RECIPE
from obdelta.errors import SettingsError
from obdelta.fleet.api_client import ApiClient, token_reader
from obdelta.fleet.pruner import Pruner, Registry
from obdelta.fleet.releases import FleetReader
from obdelta.fleet.watcher import ReleaseWatcher, Rules
from obdelta.registry import Credentials
from obdelta.registry.client import RegistryClient
from obdelta.settings import Settings


@dataclass(frozen=True, slots=True)
class Fleet:
    """The parts that use openBalena's API."""

    watcher: ReleaseWatcher
    pruner: Pruner


def fleet_credentials(configured: Settings) -> Credentials | None:
    """Returns the registry credentials with which releases are prepared, None without ``api-url``.
    Raises SettingsError for what is missing.
    """
    if configured.api_url is None:
        return None
    if configured.api_token is None:
        raise SettingsError("api-token", None, "a token of openBalena's API, with api-url")
    found = own_credentials(configured)
    if found is None:
        raise SettingsError(
            "builder-token",
            None,
            "the builder's token, with api-url: deltas are built before a device brings its own",
        )
    return found


def make_fleet(parts: Components, lists: PrebuildLists) -> Fleet | None:
    """Returns the parts that use the API, None without ``api-url``. The watcher polls already.
    Raises SettingsError.
    """
    configured = parts.settings
    credentials = fleet_credentials(configured)
    if credentials is None or configured.api_url is None or configured.api_token is None:
        return None
    api = ApiClient.connect(
        parts.reactor,
        configured.api_url,
        token_reader(configured.api_token, parts.threads),
        configured.upstream_ca,
    )
    parts.services.add_stop(api.close)
    reader = FleetReader(api, configured.image_hosts)
    watcher = ReleaseWatcher(
        reader=reader,
        images=parts.state.catalogue.fleet_images,
        lists=lists,
        credentials=credentials,
        rules=Rules(
            poll=configured.api_poll,
            devices=configured.prepare_devices,
            rollback=configured.prepare_rollback,
            seconds=configured.prepare_seconds,
            bytes=configured.prepare_bytes,
        ),
        metrics=parts.metrics,
        clock=parts.reactor,
        now=time.time,
    )
    parts.services.add_stop(watcher.close)
    parts.readiness.notes.append(watcher.note)
    watcher.poll()
    return Fleet(watcher, make_pruner(parts, reader, credentials))


def make_pruner(parts: Components, reader: FleetReader, credentials: Credentials) -> Pruner:
    """Returns the part that removes deltas that no device can ask for."""
    configured, upstream = parts.settings, parts.upstream
    pushes = configured.publish == "registry" or configured.shared is not None
    registry = None
    if pushes and isinstance(upstream, RegistryClient):
        registry = Registry(upstream, upstream.remover(), credentials)
    return Pruner(
        reader=reader,
        catalogue=parts.state.catalogue,
        blobs=parts.state.blobs,
        registry=registry,
        keep_served=configured.keep_served,
        recipe=RECIPE,
        now=time.time,
    )
