"""The list of deltas and the summaries of fleets: their entries, orders and pages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.oci import Digest, ImageNames, Reference
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.listed_deltas import SORTS, ListedDelta, ListFilter
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Outcome
from obdelta.store.catalogue.tables.fleet_images import KnownImage
from tests.support.store import REACTOR, real_threads

ALL = ListFilter()
NOW = 1_800_000_000
COMMIT = "0a1b2c3d4e5f" * 3


def key_of(number: int) -> DeltaKey:
    return DeltaKey("v2", 1, Digest.of(b"base %d" % number), Digest.of(b"target %d" % number))


async def keep(
    catalogue: Catalogue, blobs: BlobStore, number: int, size: int, served: int = 0
) -> DeltaRow:
    content = await blobs.put(b"batch %d " % number * size)
    row = await catalogue.publish_v2(
        DeltaRow(
            key_of(number),
            f"v2/base{number % 2}",
            f"v2/target{number % 2}",
            None,
            content,
            10_000,
            len(b"batch %d " % number) * size,
            1.0,
            NOW + number // 2,
        ),
        blobs,
    )
    if served:
        await catalogue.counters.served(content, NOW + 100 + number, times=served)
    return row


async def pages(
    catalogue: Catalogue, sort: str, limit: int, wanted: ListFilter = ALL
) -> list[ListedDelta]:
    found: list[ListedDelta] = []
    before: tuple[int, str] | None = None
    while page := await catalogue.listed(wanted, sort, limit, after=0, before=before):
        assert len(page) <= limit
        found += page
        before = page[-1].value(sort), page[-1].id
    return found


@pytest_twisted.ensureDeferred
async def test_pages_list_each_entry_once_in_every_order(tmp_path: Path) -> None:
    chance = random.Random(7)
    with real_threads() as threads:
        blobs = BlobStore(tmp_path, threads)
        catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
        for number in range(12):
            await keep(catalogue, blobs, number, chance.randrange(1, 9), chance.randrange(3))
        for number, outcome in enumerate(Outcome, 12):
            key = key_of(number)
            await catalogue.failures.remember(
                "v2", key.base, key.target, outcome, f"why {number}", NOW + number, 86400
            )
        for sort in SORTS:
            found = await pages(catalogue, sort, 5)
            assert len({one.id for one in found}) == len(found) == 16
            order = [(one.value(sort), one.id) for one in found]
            assert order == sorted(order, reverse=True), sort
        states = [one.state for one in await pages(catalogue, "newest", 3)]
        assert sorted(states) == ["failed"] * 2 + ["kept"] * 12 + ["skipped"] * 2
        await catalogue.close()


async def name_images(catalogue: Catalogue) -> None:
    """Gives names to images of the first three entries."""
    named = catalogue.named_images
    await named.record(key_of(0).target, ImageNames("acme", "web", "1.4", COMMIT), NOW)
    await named.record(key_of(1).base, ImageNames("GRÖSSE", "größe", "1"), NOW)
    # The API's name counts, not the one that the image has inherited.
    await named.record(key_of(2).target, ImageNames("inherited"), NOW)
    renamed = ImageNames("renamed", "", "1.5")
    image = KnownImage("v2/target0", "v2/target0", key_of(2).target, 1, renamed)
    await catalogue.fleet_images.record([image], NOW)


@pytest_twisted.ensureDeferred
async def test_filters_in_memory_and_in_the_database_select_the_same(tmp_path: Path) -> None:
    """Builds are filtered in memory, and everything else by SQL."""
    with real_threads() as threads:
        blobs = BlobStore(tmp_path, threads)
        catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
        for number in range(6):
            await keep(catalogue, blobs, number, number + 1, number)
        key = key_of(7)
        await catalogue.failures.remember(
            "v2",
            key.base,
            key.target,
            Outcome.ERROR,
            "Upstream  Gone",
            NOW,
            86400,
            repositories=("v2/base1", "v2/target1"),
        )
        await name_images(catalogue)
        everything = await pages(catalogue, "newest", 100)
        assert len(everything) == 7
        names = await catalogue.named_images.of(
            [digest for one in everything for digest in (one.key.base, one.key.target)]
        )
        for wanted in (
            ListFilter(state="kept"),
            ListFilter(state="failed"),
            ListFilter(kind="v3"),
            ListFilter(form="gzip"),
            ListFilter(search="TARGET1"),
            ListFilter(search="gone upstream"),
            ListFilter(search=f"{everything[0].id} target"),
            ListFilter(search=str(everything[2].key.base)),
            ListFilter(search="%"),
            ListFilter(search="acme/web"),
            ListFilter(search="WEB 1.4"),
            ListFilter(search="GRÖSSE größe"),
            ListFilter(search=COMMIT),
            ListFilter(search=f"({COMMIT[:12]})"),
            ListFilter(search="renamed 1.5"),
            ListFilter(search="inherited"),
            ListFilter(fleet=frozenset({"v2/target0"})),
            ListFilter(fleet=frozenset()),
        ):
            found = await pages(catalogue, "newest", 100, wanted)
            assert found == [one for one in everything if one.matches(wanted, names)], wanted
            assert found or wanted.search in ("%", "inherited") or not wanted.search, wanted
        one = everything[-1]
        assert await catalogue.listed_delta(one.id, 0) == one
        assert await catalogue.listed_delta("0" * 16, 0) is None
        assert await catalogue.fleet_of("v2/target1") == {"v2/target1"}
        # The first three targets are in two repositories.
        assert await catalogue.fleet_of("", "ACME") == {"", "v2/target0"}
        assert await catalogue.fleet_of("", "acme/web") == {"", "v2/target0"}
        assert await catalogue.fleet_of("", "größe") == {""}  # a name of a base
        assert await catalogue.fleet_of("x", "inherited") == {"x"}
        assert await catalogue.fleet_of("x", "renamed") == {"x", "v2/target0"}
        await catalogue.close()


@pytest.mark.parametrize("served", [0, 3])
@pytest_twisted.ensureDeferred
async def test_a_fleet_has_the_sums_of_its_updates(served: int, tmp_path: Path) -> None:
    with real_threads() as threads:
        blobs = BlobStore(tmp_path, threads)
        catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", REACTOR)
        row = await keep(catalogue, blobs, 0, 5, served)
        for number in range(7):
            base = Reference("", f"v2/old{number}")
            target = Reference("", "v2/target0")
            await catalogue.requested_updates.note(base, target, NOW + 1000 + number)
        (fleet,) = await catalogue.fleet_summaries()
        assert (fleet.repository, fleet.deltas, fleet.served) == ("v2/target0", 1, served)
        assert fleet.saved == served * (row.full_bytes - row.delta_bytes)
        assert [name for name, _ in fleet.versions] == [f"v2/old{n}" for n in (6, 5, 4, 3, 2)]
        assert (fleet.more_versions, fleet.last) == (3, NOW + 1006)
        assert fleet.images == {"v2/target0": key_of(0).target}  # base0 is not among the last ones
        await catalogue.close()
