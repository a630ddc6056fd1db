"""Two fleets on one server, one of them hostile: the other fleet still gets its deltas, in its
turn.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.attacks import ATTACKS, PASSWORD
from tests.support.fault_fleet import Tally, check_store
from tests.support.two_fleets import attacked, two_fleets

UPDATES = 2
LIMIT_BEFORE = 4
"""Hostile builds that may end between a build's queueing and its end, with one slot: the running
one, and one or two turns.
"""


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def run_attack(directory: Path, attack: str, updates: int, tally: Tally) -> None:
    """Runs an attack: every update of the other fleet is verified, and at most
    :data:`LIMIT_BEFORE` hostile builds come before it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with two_fleets(directory, updates, ATTACKS[attack]) as tenants:
        passed = attacked(tenants, ATTACKS[attack], updates, tally)
        log = tenants.server.log
        assert "Traceback" not in log
        assert PASSWORD not in log
        assert not CONTROL.search(log)
        assert tenants.trapped() == 0
    tally.add("updates verified during an attack", len(passed))
    tally.add("updates held up", sum(one.before > LIMIT_BEFORE for one in passed))
    tally.add("files compared with their digests", check_store(directory / "state"))


def run_tenants(directory: Path, updates: int, tally: Tally) -> None:
    """Runs every attack, each on a separate server."""
    for number, attack in enumerate(ATTACKS):
        run_attack(directory / str(number), attack, updates, tally)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_tenant_holds_up_another(attack: str, tmp_path: Path) -> None:
    tally = Tally()
    run_attack(tmp_path, attack, UPDATES, tally)
    tally.show()
    assert tally.counts["updates verified during an attack"] == UPDATES
    assert tally.counts["updates held up"] == 0
    if ATTACKS[attack].keeps_building:
        assert tally.counts["hostile builds that were done meanwhile"] > 3
