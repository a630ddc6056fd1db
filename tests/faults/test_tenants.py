"""Two fleets on one server, and one of them is hostile: the other one's deltas come all the same,
in their turn.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_fleet import Tally, check_store
from tests.support.tenants import ATTACKS, BUILDING, attacked, two_fleets

UPDATES = 2
MOST_BEFORE = 4
"""Hostile builds that may end between a build's queueing and its end, with one place: the one that
runs, and a turn or two.
"""
MOST_FLEETS = 12
"""Fleets that the images of many hostile devices can be taken for. Fleets never merge, so each has
a turn of its own (docs/security.md).
"""


def run_attack(directory: Path, attack: str, updates: int, tally: Tally) -> None:
    """Every update of the other fleet is verified, and no more than :data:`MOST_BEFORE` hostile
    builds come before it, or a turn of each fleet more against many devices.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with two_fleets(directory, updates, long_work="long work" in attack) as tenants:
        passed = attacked(tenants, attack, updates, tally)
        assert "Traceback" not in tenants.server.log
    most = MOST_BEFORE + (MOST_FLEETS if "many devices" in attack else 0)
    tally.add("updates verified during an attack", len(passed))
    tally.add("updates held up", sum(one.before > most for one in passed))
    tally.add("files compared with their digests", check_store(directory / "state"))


def run_tenants(directory: Path, updates: int, tally: Tally) -> None:
    """Every attack, on a server of its own."""
    for number, attack in enumerate(ATTACKS):
        run_attack(directory / str(number), attack, updates, tally)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_tenant_holds_up_another(attack: str, tmp_path: Path) -> None:
    tally = Tally()
    run_attack(tmp_path, attack, UPDATES, tally)
    tally.show()
    assert tally.counts["updates verified during an attack"] == UPDATES
    assert tally.counts["updates held up"] == 0
    if attack in BUILDING:
        assert tally.counts["hostile builds that were done meanwhile"] > 3
