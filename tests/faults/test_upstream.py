"""An upstream that is cut, slow and wrong at random bytes: no wrong byte is passed on, nothing is
left over, and every device updates.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.registry import serving
from tests.support.fault_fleet import Fleet, Tally, check_store, make_fleet, until_tidy
from tests.support.fault_line import FAULTS, bad_line
from tests.support.server import running_server

UPDATES = 15
SEED = 61


def run_upstream_faults(directory: Path, updates: int, tally: Tally, seed: int = SEED) -> None:
    """Runs this number of devices, three at a time, each with its own pair; about one image in two
    meets a fault.
    """
    state = directory / "state"
    with (
        serving(directory / "registry") as registry,
        bad_line(registry, seed, 40_000, tally) as line,
    ):
        make_fleet(directory, registry, updates + 2)
        fleet = Fleet(registry)
        options: dict[str, Any] = {"effort": "fast", "max_delta_ratio": "10", "max_builds": "3"}
        with running_server(
            state,
            upstream=line.url,
            constants={"obdelta.builds.verdicts.FAILURE_MEMORY": 1},
            **options,
        ) as server:

            def update(number: int) -> bool:
                # Wrong bytes three times in a row lead to a full pull, which these devices make
                # from the registry itself.
                return any(
                    fleet.update_again(server.url, number, 40, tally).is_delta for _ in range(40)
                )

            with ThreadPoolExecutor(3) as devices:
                assert all(devices.map(update, range(updates)))
            tally.add("updates verified over a faulty line", updates)
            line.restore()
            assert fleet.update_again(server.url, updates, 5, tally).is_delta
            until_tidy(state, server.operator_url)
    tally.add("files compared with their digests", check_store(state))


def test_a_bad_connection_to_the_upstream(tmp_path: Path) -> None:
    tally = Tally()
    run_upstream_faults(tmp_path, UPDATES, tally)
    tally.show()
    for fault in FAULTS:
        assert tally.counts[f"upstream: {fault}"] > UPDATES // 6
