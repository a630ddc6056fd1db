"""Pruning of a real catalogue, by an API and a registry that fail at any moment. The API is the
tests' double over real HTTP; tests/server/test_fleet.py prunes a real registry.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from obdelta.builds.publish.batch_publisher import batch_manifest
from obdelta.concurrency.threads import Threads
from obdelta.errors import ApiUnavailable, Denied, ObdeltaError, UpstreamUnavailable
from obdelta.fleet import api_client
from obdelta.fleet.api_client import ApiClient, token_reader
from obdelta.fleet.pruner import MAX_UNAVAILABLE, Pruner, Registry
from obdelta.fleet.releases import FleetReader
from obdelta.oci import Digest, ImageNames, Manifest
from obdelta.registry import Credentials
from obdelta.registry.requests import Backoff
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.catalogue.tables.fleet_images import KnownImage
from tests.support.openbalena_api import TOKEN, Answer, OpenBalenaApi, running_api
from tests.support.store import REACTOR, a_row, blobs, opened, threads
from tests.unit.fleet.test_prune_model import Fleet, a_fleet, may_be_requested

__all__ = ["blobs", "threads"]

NOW = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
OLD = datetime(2026, 1, 1, tzinfo=UTC)
BATCH = b"a batch"


def repository(release: int) -> str:
    return f"v2/{release:016x}{'ab' * 8}"


@pytest.fixture(autouse=True)
def retries_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "BACKOFF", Backoff(attempts=2, first=0.01, most=0.02))


@pytest.fixture
def api() -> Iterator[OpenBalenaApi]:
    with running_api() as running:
        yield running


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


NAMES = ImageNames.of("acme", "web", "1.0.0", "c0ffee")


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


def rows(*found: object) -> Answer:
    return Answer(200, json.dumps({"d": found}).encode())


FAULTS: dict[str, Callable[[str], Answer | None]] = {
    "a server error": lambda _path: Answer(500),
    "a refusal": lambda _path: Answer(403),
    "no JSON": lambda _path: Answer(200, b'{"d": [{"id": 1}'),
    "no rows": lambda _path: Answer(200, b"{}"),
    "a row that is none": lambda _path: rows(None),
    "a row without its fields": lambda _path: rows({"id": 1}, {}),
    "more rows than asked for": lambda _path: rows(*[{"id": n} for n in range(1, 200)]),
    "rows that were not asked for": lambda _path: rows(
        {
            "id": 1,
            "is_stored_at__image_location": "registry.example.com/v2/other",
            "app_name": "other",
            "is_of__class": "fleet",
            "is_host": False,
            "owns__device": 3,
        },
        {"id": 1},
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest_twisted.ensureDeferred
async def test_an_error_of_the_api_at_any_request_removes_nothing(
    seed: int, api: OpenBalenaApi, threads: Threads, blobs: BlobStore, tmp_path: Path
) -> None:
    async with pruning(seed, api, threads, blobs, tmp_path / "state") as (world, pruner):
        before, pushed = await world.stored(), world.registry.deltas()
        await pruner.prune(False)
        requests = len(api.requests)
        assert requests >= 5
        for name, fault in FAULTS.items():
            for place in range(requests):
                first = len(api.requests) + place
                api.instead = lambda path, first=first, fault=fault: (  # type: ignore[misc]
                    fault(path) if len(api.requests) > first else None
                )
                if name == "a row without its fields" and place in (1, requests - 1):
                    continue  # those two only ask whether the token is known
                if name == "rows that were not asked for" and place in (1, requests - 1):
                    continue
                with pytest.raises(ApiUnavailable):
                    await pruner.prune(True)
                assert await world.stored() == before, f"{name} at request {place}"
                assert world.registry.deltas() == pushed
        api.instead = lambda _path: None
        # A token that expires in between: the API takes the next requests for those of a guest.
        for place in range(requests):
            first = len(api.requests) + place
            api.tokens = {TOKEN}

            def expire(_path: str, first: int = first) -> None:
                if len(api.requests) > first:
                    api.tokens = set()

            api.instead = expire
            with pytest.raises(ApiUnavailable):
                await pruner.prune(True)
            assert await world.stored() == before
            assert world.registry.deltas() == pushed


@pytest.mark.parametrize("seed", range(12))
@pytest_twisted.ensureDeferred
async def test_errors_of_some_repositories_keep_only_these_from_being_pruned(
    seed: int, api: OpenBalenaApi, threads: Threads, blobs: BlobStore, tmp_path: Path
) -> None:
    async with pruning(seed, api, threads, blobs, tmp_path / "state") as (world, pruner):
        chance = random.Random(seed)
        registry, pushed, before = world.registry, world.registry.deltas(), await world.stored()
        for name in sorted(registry.manifests):
            if chance.random() < 0.3:
                error = chance.choice([UpstreamUnavailable("it hangs"), Denied("no deletion")])
                registry.fails[name] = error
        done = await pruner.prune(True)
        gone = before - await world.stored()
        removed = {
            (base, target)
            for base, target in world.pairs
            if (repository(base), repository(target)) in gone
        }
        world.check(removed, exactly=True)
        assert {(one.base_repository, one.target_repository) for one in done.stored} == gone
        unpushed = pushed - registry.deltas()
        removed = {
            (base, target)
            for base, target in world.pairs
            if (repository(target), f"delta-{repository(base)[3:19]}") in unpushed
        }
        world.check(removed, exactly=not registry.fails)
        failed = {one.repository for one in done.problems}
        assert failed <= set(registry.fails)
        assert not {name for name, _ in unpushed} & set(registry.fails)
        assert {(one.repository, tag) for one in done.registry for tag in one.tags} == unpushed
        # The next run does what is left.
        registry.fails.clear()
        assert (await pruner.prune(True)).problem is None
        removed = {
            (base, target)
            for base, target in world.pairs
            if (repository(target), f"delta-{repository(base)[3:19]}") not in registry.deltas()
        }
        world.check(removed, exactly=True)


@pytest_twisted.ensureDeferred
async def test_a_registry_that_never_answers_is_not_tried_for_every_repository(
    api: OpenBalenaApi, threads: Threads, blobs: BlobStore, tmp_path: Path
) -> None:
    async with pruning(3, api, threads, blobs, tmp_path / "state") as (world, pruner):
        visible = [release for release in world.known if world.visible(release)]
        assert len(visible) > MAX_UNAVAILABLE
        away = UpstreamUnavailable("it hangs")
        world.registry.fails = {repository(release): away for release in visible}
        done = await pruner.prune(True)
        assert len(world.registry.tried) == MAX_UNAVAILABLE
        assert {one.repository for one in done.problems} == set(world.registry.fails)
        assert f"(and {len(visible) - 1} more repositories)" in str(done.problem)


@pytest_twisted.ensureDeferred
async def test_an_image_of_another_registry_says_nothing_about_ours(
    api: OpenBalenaApi, threads: Threads, blobs: BlobStore, tmp_path: Path
) -> None:
    """A migrated API names the images of the registry of before, in the same repositories."""
    async with pruning(0, api, threads, blobs, tmp_path / "state") as (world, pruner):
        before = await world.stored()
        kept = (await pruner.prune(False)).kept
        application = api.application()
        for fleet in world.fleets:
            await world.record("old.example.com", application, fleet)
        assert (await pruner.prune(False)).kept == kept
        # All of them are of other registries.
        pruner._reader = FleetReader(pruner._reader._api, ["another.example.com"])
        world.registry.tried.clear()
        done = await pruner.prune(True)
        assert (done.stored, done.registry) == ([], []) and world.registry.tried == []
        assert await world.stored() == before


@pytest_twisted.ensureDeferred
async def test_an_image_under_two_names_of_our_registry_is_held_under_either(
    api: OpenBalenaApi, threads: Threads, blobs: BlobStore, tmp_path: Path
) -> None:
    async with pruning(0, api, threads, blobs, tmp_path / "state") as (world, pruner):
        pruner._reader = FleetReader(pruner._reader._api, [api.registry, "a.example.com", "z.io"])
        kept = (await pruner.prune(False)).kept
        for host in ("a.example.com", "z.io"):
            for fleet in world.fleets:
                shown = [
                    image.application
                    for image in await world.catalogue.fleet_images.all()
                    if image.repository in {repository(one) for one in fleet.releases}
                ]
                if shown:
                    await world.record(host, shown[0], fleet)
        assert (await pruner.prune(False)).kept == kept
