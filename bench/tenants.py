"""``python -m bench.tenants``: seconds that one fleet's updates take while another fleet attacks
the same server.

Measures each attack of ``tests/support/attacks.py``, and no attack. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.support.attacks import ATTACKS, NO_ATTACK
from tests.support.fault_fleet import Tally
from tests.support.two_fleets import attacked, two_fleets

PEACE = "no attack"
GOAL = 10.0


def main() -> None:
    """Measures every attack, or the named ones."""
    parser = argparse.ArgumentParser(prog="bench.tenants", description=__doc__)
    parser.add_argument(
        "--updates", type=int, default=5, help="updates of the attacked fleet for each attack"
    )
    parser.add_argument("--max-builds", default="1", help="build places of the server")
    parser.add_argument("attacks", nargs="*", default=[PEACE, *ATTACKS], metavar="ATTACK")
    given = parser.parse_args()
    print(
        "| attack | median s | longest s | hostile builds before | hostile builds in all | goal of"
        " 10 s |"
    )
    print("|---|---:|---:|---:|---:|---|")
    for attack in given.attacks:
        tally, plan = Tally(), ATTACKS.get(attack, NO_ATTACK)
        with (
            tempfile.TemporaryDirectory() as directory,
            two_fleets(
                Path(directory), given.updates, plan, max_builds=given.max_builds
            ) as tenants,
        ):
            passed = attacked(tenants, plan, given.updates, tally)
        seconds = [one.seconds for one in passed]
        before = max(one.before for one in passed)
        print(
            f"| {attack} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | {before} |"
            f" {tally.counts['hostile builds that were done meanwhile']} |"
            f" {'yes' if max(seconds) < GOAL else 'NO'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
