"""Fleets: which repositories an update connects, and which a hostile one does not."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.store.catalogue import fleet_bytes
from obdelta.store.fleets import Fleets

VICTIM = [("victim/1", "victim/2"), ("public", "victim/2"), ("victim/2", "victim/3")]
BRIDGES = [
    ("public", "evil/1"),
    ("evil/1", "public"),
    ("evil/2", "public"),
    ("evil/1", "evil/2"),
    ("public", "evil/2"),
    ("evil/1", "evil/3"),
]
HOSTILE = ("evil/1", "evil/2", "evil/3")


def test_updates_connect_repositories() -> None:
    fleets = Fleets()
    assert fleets.of("a1", "a2") == fleets.of("a2", "a3") == fleets.of("a1", "a3")
    assert fleets.of("a3", "a4") == fleets.fleet("a2")
    assert fleets.of("b1", "b2") != fleets.fleet("a2")
    assert fleets.of("b1", "b3") == fleets.of("b1", "b4") == fleets.fleet("b2")


def test_two_fleets_never_become_one() -> None:
    fleets = Fleets()
    first, second = fleets.of("a1", "a2"), fleets.of("b1", "b2")
    assert fleets.of("a2", "b2") == second
    assert fleets.of("b2", "a1") == first
    assert (fleets.fleet("a2"), fleets.fleet("b2")) == (first, second)


def test_a_base_of_several_fleets_connects_nothing() -> None:
    fleets = Fleets()
    fleets.of("a1", "a2")
    fleets.of("b1", "b2")
    fleets.of("a2", "b2")
    assert fleets.of("a2", "c") == "c" != fleets.fleet("a2")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=12))
def test_the_fleet_that_a_new_repository_would_join(updates: list[tuple[str, str]]) -> None:
    fleets = Fleets()
    for update in updates:
        fleets.of(*update)
    for base in "abcdef":
        assigned = fleets.fleet("new", base)
        assert fleets.fleet("new") == "new"  # nothing was connected
        again = Fleets()
        for update in updates:
            again.of(*update)
        assert again.of(base, "new") == assigned or (
            again.fleet(base) == "new" and assigned == base
        )


@pytest.mark.parametrize("turn", range(len(BRIDGES)))
@pytest.mark.parametrize("known", [2, 3])
@pytest.mark.parametrize("first", ["victim/1", "public"])
def test_public_images_bridge_no_fleets(turn: int, known: int, first: str) -> None:
    """Whichever request comes first, and whether or not a device moved from the public image
    before.
    """
    victim = VICTIM if first == "victim/1" else [VICTIM[1], VICTIM[0], VICTIM[2]]
    fleets = Fleets()
    for base, target in victim[:known]:
        fleets.of(base, target)
    for base, target in BRIDGES[turn:] + BRIDGES[:turn]:
        fleets.of(base, target)
    for base, target in victim:
        assert fleets.of(base, target) not in {fleets.fleet(name) for name in HOSTILE}


REPOSITORIES = st.sampled_from([f"r{number}" for number in range(9)])


@given(st.lists(st.tuples(REPOSITORIES, REPOSITORIES), max_size=40))
def test_no_update_joins_fleets_of_two_or_more(updates: list[tuple[str, str]]) -> None:
    fleets = Fleets()
    names = {f"r{number}" for number in range(9)}

    def members() -> dict[str, set[str]]:
        found = defaultdict(set)
        for name in names:
            found[fleets.fleet(name)].add(name)
        return found

    for base, target in updates:
        before = members()
        fleet = fleets.of(base, target)
        after = members()
        assert fleet == fleets.fleet(target)
        for group in before.values():
            assert len(group) == 1 or any(group <= other for other in after.values())
        # An update moves at most one repository, which was alone before.
        grown = [group for group in after.values() if group not in before.values()]
        assert len(grown) <= 1
        for group in grown:
            parts = [part for part in before.values() if part <= group]
            assert len(parts) == 2 and min(map(len, parts)) == 1
            assert group >= {base, target}


def test_fleets_take_bounded_memory() -> None:
    fleets = Fleets(10)
    for number in range(100):
        fleets.of(f"r{number}", f"r{number + 1}")
        fleets.of("public", f"r{number}")
        fleets.of(f"s{number}", f"t{number}")
    assert len(fleets._fleet_of) <= 10
    assert sum(map(len, fleets._members.values())) == len(fleets._fleet_of)
    assert fleets._bases <= set(fleets._fleet_of)
    assert set(fleets._founders) <= set(fleets._members)


def test_stored_deltas_of_two_tenants_stay_those_of_two_fleets() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE publications (delta, base_repository, target_repository)")
        rows = [(*pair,) for pair in (*VICTIM, *BRIDGES)]
        connection.executemany(
            "INSERT INTO publications VALUES (?, ?, ?)",
            [(number, *row) for number, row in enumerate(rows)],
        )
        found = fleet_bytes._fleets_of_deltas(connection)
    hostile = {
        name for number, row in enumerate(rows) if row[1] in HOSTILE for name in found[number]
    }
    assert found[0] == found[1] == found[2] and not hostile & found[0]
