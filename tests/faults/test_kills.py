"""kill -9 at random moments of builds and after them: no wrong byte is served, nothing is left
over, and work continues.

The servers and their registry are real. One of the chains pushes its deltas there, too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.registry import serving
from tests.support.fault_fleet import Fleet, Tally, make_fleet
from tests.support.fault_kills import Chain, victims

KILLS = 100
SEED = 20261125


def run_kills(directory: Path, kills: int, tally: Tally, seed: int = SEED) -> None:
    """Runs two chains at the same time, each with half of the kills."""
    half = kills // 2
    with serving(directory / "registry") as registry, ExitStack() as closing:
        make_fleet(directory, registry, half + 2)
        pushing = {
            "publish": "registry",
            "upstream-credentials": "none",
            "publish-host": registry.partition("//")[2],
        }
        chains = [
            Chain(
                Fleet(registry),
                closing.enter_context(victims(registry, directory / name, **options)),
                seed + n,
                0,
            )
            for n, (name, options) in enumerate({"serving": {}, "pushing": pushing}.items())
        ]
        with ThreadPoolExecutor(len(chains)) as threads:
            for done in [threads.submit(chain.run, half, tally) for chain in chains]:
                done.result()


def test_kills_at_random_moments(tmp_path: Path) -> None:
    tally = Tally()
    run_kills(tmp_path, KILLS, tally)
    tally.show()
    assert tally.counts["kills"] == KILLS
    assert tally.counts["updates verified after a kill"] == KILLS
    # The kills were spread over the whole build, and after it.
    stages = {name for name in tally.counts if name.startswith("kills: ")}
    assert len(stages) >= 6, stages
    assert tally.counts["devices that were cut off"] > KILLS // 4
