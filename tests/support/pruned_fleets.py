"""Random fleets in the tests' API, with deltas of their images in a real catalogue and in a
registry in memory that fails.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obdelta.builds.publish.batch_publisher import batch_manifest
from obdelta.concurrency.tasks import Threads
from obdelta.errors import ObdeltaError, UpstreamUnavailable
from obdelta.fleet.api_client import ApiClient, token_reader
from obdelta.fleet.pruner import Pruner, Registry
from obdelta.fleet.releases import FleetReader
from obdelta.oci import Digest, ImageNames, Manifest
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.catalogue.tables.fleet_images import KnownImage
from tests.support.openbalena_api import TOKEN, OpenBalenaApi
from tests.support.store import REACTOR, a_row, opened

NOW = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
OLD = datetime(2026, 1, 1, tzinfo=UTC)
BATCH = b"a batch"
NAMES = ImageNames.of("acme", "web", "1.0.0", "c0ffee")


@dataclass
class Fleet:
    """One fleet: which releases exist, and what its devices have and are to have."""

    hidden: bool
    host: bool
    releases: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    devices: list[set[int]] = field(default_factory=list)


def a_fleet(chance: random.Random, first: int) -> Fleet:
    fleet = Fleet(hidden=chance.random() < 0.2, host=chance.random() < 0.2)
    for release in range(first, first + chance.randrange(1, 8)):
        fleet.releases.add(release)
    for _ in range(chance.randrange(6)):
        # The release that runs, and perhaps the one to run: openBalena deletes no release that
        # has such devices.
        fleet.devices.append(
            set(chance.sample(sorted(fleet.releases), min(2, len(fleet.releases))))
        )
    needed = set().union(*fleet.devices)
    for release in sorted(fleet.releases - needed):
        if chance.random() < 0.4:
            fleet.releases.remove(release)
            fleet.deleted.add(release)
    return fleet


def may_be_requested(fleets: list[Fleet], base: int, target: int) -> bool:
    """Whether a device may ask: it has the base or is to have it, and the target is in a release.

    Devices may move between fleets. Hidden fleets may have any device, devices of host releases do
    not report, and a fleet without a visible device may have some.
    """
    exists = any(target in fleet.releases for fleet in fleets)
    has = any(base in device for fleet in fleets for device in fleet.devices) or any(
        base in fleet.releases and (fleet.hidden or fleet.host or not fleet.devices)
        for fleet in fleets
    )
    return exists and has


def repository(release: int) -> str:
    return f"v2/{release:016x}{'ab' * 8}"


class FailingRegistry:
    """A registry in memory. ``fails`` has the error of each repository that has one."""

    def __init__(self) -> None:
        self.manifests: dict[str, dict[Digest, tuple[Manifest, set[str]]]] = {}
        self.fails: dict[str, ObdeltaError] = {}
        self.tried: list[str] = []

    def add(self, base: str, target: str) -> None:
        key = DeltaKey("v2", 1, Digest.of(base.encode()), Digest.of(target.encode()))
        row = replace(a_row(key, Digest.of(BATCH), 1, len(BATCH)), details={"tail": 0})
        manifest = batch_manifest(row)
        tags = {f"delta-{base[3:19]}"}
        self.manifests.setdefault(target, {})[manifest.digest] = (manifest, tags)

    def deltas(self) -> set[tuple[str, str]]:
        """The tags of each repository that are left."""
        return {
            (repository, tag)
            for repository, manifests in self.manifests.items()
            for _, tags in manifests.values()
            for tag in tags
        }

    def _may_fail(self, repository: str) -> None:
        if repository in self.fails:
            raise self.fails[repository]

    async def tags(self, repository: str, _credentials: object) -> list[str]:
        self.tried.append(repository)
        if isinstance(self.fails.get(repository), UpstreamUnavailable):
            self._may_fail(repository)
        found = self.manifests.get(repository, {}).values()
        return [tag for _, tags in found for tag in sorted(tags)]

    async def digest(self, repository: str, tag: str, _credentials: object) -> Digest | None:
        found = self.manifests.get(repository, {}).items()
        return next((digest for digest, (_, tags) in found if tag in tags), None)

    async def manifest(self, repository: str, selector: str, _credentials: object) -> Manifest:
        return self.manifests[repository][Digest.parse(selector)][0]

    async def delete(self, repository: str, digest: Digest, _credentials: object) -> None:
        self._may_fail(repository)
        del self.manifests[repository][digest]


class World:
    """Random fleets in the API, and a delta of each pair of their images in store and registry."""

    def __init__(
        self, seed: int, api: OpenBalenaApi, catalogue: Catalogue, blobs: BlobStore
    ) -> None:
        self.api, self.catalogue, self.blobs = api, catalogue, blobs
        chance = random.Random(seed)
        self.fleets = [a_fleet(chance, 100 * number) for number in range(1, 4)]
        self.registry = FailingRegistry()
        self.known = {
            release: fleet
            for fleet in self.fleets
            for release in sorted(fleet.releases | fleet.deleted)
            if chance.random() < 0.9
        }
        everything = sorted(one for fleet in self.fleets for one in fleet.releases | fleet.deleted)
        pairs = [(base, target) for base in everything for target in everything if base != target]
        self.pairs = chance.sample(pairs, min(60, len(pairs)))

    async def fill(self) -> None:
        for fleet in self.fleets:
            await self._add(fleet)
        await self.blobs.put(BATCH)
        for base, target in self.pairs:
            names = repository(base), repository(target)
            key = DeltaKey("v2", 1, Digest.of(names[0].encode()), Digest.of(names[1].encode()))
            row = a_row(key, Digest.of(BATCH), 1, len(BATCH))
            row = replace(row, base_repository=names[0], target_repository=names[1])
            await self.catalogue.publish_v2(row, self.blobs)
            self.registry.add(*names)

    async def _add(self, fleet: Fleet) -> None:
        api, application = self.api, self.api.application(host=fleet.host)
        ids = {
            release: api.release(application, {"web": (repository(release), None)}, finalized=OLD)
            for release in sorted(fleet.releases | fleet.deleted)
        }
        devices = []
        for device in fleet.devices:
            runs, *is_to_run = sorted(device)
            (made,) = api.devices(ids[runs])
            devices.append(made)
            if is_to_run:
                api.tables["device"][made]["pinned"] = ids[is_to_run[0]]
        for release in ids if fleet.hidden else fleet.deleted:
            api.delete_release(ids[release])
        if fleet.hidden:
            del api.tables["application"][application]
            for made in devices:
                del api.tables["device"][made]
        await self.record(api.registry, application, fleet)

    async def record(self, host: str, application: int, fleet: Fleet) -> None:
        images = [
            KnownImage(
                f"{host}/{repository(release)}", repository(release), None, application, NAMES
            )
            for release in fleet.releases | fleet.deleted
            if release in self.known
        ]
        await self.catalogue.fleet_images.record(images, NOW)

    async def stored(self) -> set[tuple[str, str]]:
        return {
            (each.base_repository, each.target_repository)
            for each in await self.catalogue.publications()
        }

    def visible(self, release: int) -> bool:
        return release in self.known and not self.known[release].hidden

    def check(self, removed: set[tuple[int, int]], *, exactly: bool) -> None:
        """Checks removed pairs against the model of what devices may ask for."""
        for base, target in self.pairs:
            possible = may_be_requested(self.fleets, base, target)
            seen = self.visible(base), self.visible(target)
            if possible or not any(seen):
                assert (base, target) not in removed, f"{base} → {target}"
            elif all(seen) and exactly:
                assert (base, target) in removed, f"{base} → {target}"


@asynccontextmanager
async def pruning(
    seed: int, api: OpenBalenaApi, threads: Threads, blobs: BlobStore, folder: Path
) -> AsyncIterator[tuple[World, Pruner]]:
    folder.mkdir()
    client = ApiClient.connect(REACTOR, api.url, token_reader(TOKEN, threads))
    async with opened(folder) as catalogue:
        world = World(seed, api, catalogue, blobs)
        await world.fill()
        registry: Any = world.registry
        yield (
            world,
            Pruner(
                reader=FleetReader(client, [api.registry]),
                catalogue=catalogue,
                blobs=blobs,
                registry=Registry(registry, registry, Credentials.anonymous()),
                keep_served=0,
                recipe=1,
                now=lambda: NOW,
            ),
        )
    await client.close()
