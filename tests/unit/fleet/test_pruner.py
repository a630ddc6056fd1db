"""Pruning of a real catalogue, by an API and a registry that fail at any moment. The API is the
tests' double over real HTTP; tests/server/test_fleet.py prunes a real registry.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.concurrency.tasks import Threads
from obdelta.errors import ApiUnavailable, Denied, UpstreamUnavailable
from obdelta.fleet.pruner import MAX_UNAVAILABLE
from obdelta.fleet.releases import FleetReader
from obdelta.store.blobs import BlobStore
from tests.support.openbalena_api import (
    TOKEN,
    Answer,
    OpenBalenaApi,
    api,
    retries_are_quick,
)
from tests.support.pruned_fleets import pruning, repository
from tests.support.store import blobs, threads

__all__ = ["api", "blobs", "retries_are_quick", "threads"]


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
