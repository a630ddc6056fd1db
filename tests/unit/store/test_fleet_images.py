"""Images of releases that openBalena's API named: kept, bounded, and their names before labels."""

from __future__ import annotations

from pathlib import Path

import pytest_twisted

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.fleet_images import FleetImages, KnownImage
from tests.support.store import REACTOR

NOW = 1_800_000_000.0


def image(number: int, *, fleet: str = "acme", manifest: Digest | None = None) -> KnownImage:
    return KnownImage(
        f"registry.example.com/v2/{number:032x}",
        f"v2/{number:032x}",
        manifest,
        7,
        ImageNames.of(fleet, "web", f"{number}.0.0", "c0ffee"),
    )


@pytest_twisted.ensureDeferred
async def test_images_are_found_by_repository_and_replaced(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    images = FleetImages(database)
    await images.record([], NOW)
    await images.record([image(1), image(2, manifest=Digest("ab" * 32))], NOW)
    await images.record([image(2, fleet="renamed")], NOW + 1)
    assert await images.all() == [image(1), image(2, fleet="renamed")]
    assert await images.of([image(2).repository, "v2/none"]) == {
        image(2).repository: image(2, fleet="renamed")
    }
    await database.close()


@pytest_twisted.ensureDeferred
async def test_the_oldest_go_above_the_limit(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "catalogue.sqlite", REACTOR)
    images = FleetImages(database, most=3)
    for number in range(6):
        await images.record([image(number)], NOW + number)
    assert await images.all() == [image(3), image(4), image(5)]
    await database.close()


@pytest_twisted.ensureDeferred
async def test_names_of_the_api_come_before_those_of_labels(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
    inherited, alone = Digest("ab" * 32), Digest("cd" * 32)
    for digest in (inherited, alone):
        await catalogue.named_images.record(digest, ImageNames("debian"), NOW + 5)
    await catalogue.fleet_images.record([image(1, manifest=inherited)], NOW)
    found = await catalogue.named_images.of([inherited, alone])
    assert {str(name) for name in found.values()} == {"acme/web 1.0.0 (c0ffee)", "debian"}
    await catalogue.close()
