"""Which deltas a new release needs: from which releases, in which order, for which services."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as some

from obdelta.fleet.release_plan import plan
from obdelta.fleet.releases import FleetImage, Release, Running
from obdelta.oci import Reference

SERVICES = ("web", "db", "log")


def release(id_: int, services: tuple[str, ...] = SERVICES) -> Release:
    images = tuple(
        FleetImage(f"r/v2/{id_}-{name}", Reference("", f"v2/{id_}-{name}"), name)
        for name in services
    )
    return Release(id_, 1, "acme", f"{id_}.0.0", f"{id_:040x}", "", "", images)


def planned(
    running: list[Running], *, devices: int = 1, rollback: int = 0, most: int = 1000
) -> list[tuple[str, str]]:
    pairs = plan(release(100), running, devices=devices, rollback=rollback, most=most)
    return [(base.repository, target.repository) for base, target in pairs]


def test_every_service_of_the_commonest_release_comes_first() -> None:
    running = [Running(release(1), 3), Running(release(2, ("web", "old")), 8)]
    assert planned(running) == [
        ("v2/2-web", "v2/100-web"),
        *((f"v2/1-{name}", f"v2/100-{name}") for name in SERVICES),
    ]


def test_few_devices_and_the_release_itself_are_no_bases() -> None:
    running = [Running(release(100), 50), Running(release(1, ("web",)), 4), Running(release(2), 3)]
    assert planned(running, devices=4) == [("v2/1-web", "v2/100-web")]
    assert planned(running, devices=51) == []


def test_rollbacks_follow_all_updates_and_only_for_the_first_releases() -> None:
    running = [Running(release(n, ("web",)), n) for n in (1, 2, 3)]
    assert planned(running, rollback=2) == [
        ("v2/3-web", "v2/100-web"),
        ("v2/2-web", "v2/100-web"),
        ("v2/1-web", "v2/100-web"),
        ("v2/100-web", "v2/3-web"),
        ("v2/100-web", "v2/2-web"),
    ]
    assert len(planned(running, rollback=9)) == 6


def test_an_image_that_both_releases_share_needs_no_delta() -> None:
    shared = Release(1, 1, "acme", "1", "", "", "", release(100).images[:1] + release(1).images[1:])
    assert planned([Running(shared, 1)]) == [
        ("v2/1-db", "v2/100-db"),
        ("v2/1-log", "v2/100-log"),
    ]


@settings(deadline=None, max_examples=200)
@given(
    some.lists(some.tuples(some.integers(1, 99), some.integers(0, 20)), unique_by=lambda x: x[0]),
    some.integers(1, 10),
    some.integers(0, 5),
    some.integers(0, 40),
)
def test_a_plan_has_each_pair_once_and_keeps_the_useful_part(
    running: list[tuple[int, int]], devices: int, rollback: int, most: int
) -> None:
    given_ = [Running(release(id_), count) for id_, count in running]
    whole = planned(given_, devices=devices, rollback=rollback)
    assert len(set(whole)) == len(whole)
    assert planned(given_, devices=devices, rollback=rollback, most=most) == whole[:most]
    used = [count for _, count in running if count >= devices]
    assert len(whole) == len(SERVICES) * (len(used) + min(rollback, len(used)))
