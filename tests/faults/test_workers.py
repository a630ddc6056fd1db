"""Worker processes that are killed, or get no memory: only their own builds are affected, and these
are retried once.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.registry import serving
from tests.support.fault_fleet import Fleet, Tally, builds, check_store, make_fleet, until_tidy
from tests.support.server import running_server

KILLS = 10
SEED = 62


def workers_of(pid: int) -> list[int]:
    """Returns the server's worker processes. Source: proc(5), ``task/*/children``."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, (task / "children").read_text("ascii").split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if (
                        b"obdelta.processes.worker_main"
                        in Path(f"/proc/{child}/cmdline").read_bytes()
                    ):
                        found.append(child)
    return found


def run_worker_kills(directory: Path, kills: int, tally: Tally, seed: int = SEED) -> None:
    """Updates two devices at a time; during a build a worker process is killed, whether it works
    for them or waits.
    """
    state = directory / "state"
    source = random.Random(seed)
    with serving(directory / "registry") as registry:
        make_fleet(directory, registry, 2 * kills + 2, size=300_000)
        fleet = Fleet(registry)
        options: dict[str, Any] = {"effort": "small", "max_delta_ratio": "10"}
        with running_server(
            state,
            upstream=registry,
            constants={"obdelta.builds.verdicts.FAILURE_MEMORY": 0},
            **options,
        ) as server:

            def update(number: int) -> bool:
                # After two kills it is a full pull, which these devices make from the registry
                # itself.
                return any(
                    fleet.update_again(server.url, number, 20, tally).is_delta for _ in range(20)
                )

            with ThreadPoolExecutor(2) as devices:
                for number in range(0, 2 * kills, 2):
                    both = [devices.submit(update, number + device) for device in (0, 1)]
                    while not all(device.done() for device in both):
                        if any(
                            build["state"] == "running" for build in builds(server.operator_url)
                        ):
                            time.sleep(source.uniform(0, 0.1))  # the moment is an input of the test
                            killed = kill_one(server.process.pid, source)
                            tally.add("worker processes killed", killed)
                            break
                    assert all(device.result() for device in both)
            tally.add("updates verified while worker processes were killed", 2 * kills)
            assert fleet.update(server.url, 2 * kills).is_delta
            until_tidy(state, server.operator_url)
    tally.add("files compared with their digests", check_store(state))
    tally.add("builds retried", counters(state).get("build.retried", 0))


def kill_one(server: int, source: random.Random) -> int:
    """Kills a worker process; returns how many."""
    workers = workers_of(server)
    if not workers:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(source.choice(workers), signal.SIGKILL)
    return 1


def counters(state: Path) -> dict[str, int]:
    """Returns the counters of a server that has ended."""
    with contextlib.closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
        return dict(connection.execute("SELECT name, value FROM counters"))


def test_killed_workers_cost_no_update(tmp_path: Path) -> None:
    tally = Tally()
    run_worker_kills(tmp_path, KILLS, tally)
    tally.show()
    assert tally.counts["worker processes killed"] >= KILLS // 2
    assert tally.counts["builds retried"] >= 1


def test_workers_without_memory_lead_to_full_pulls_until_they_have_memory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        fleet = Fleet(registry)
        with running_server(
            state, upstream=registry, max_delta_ratio="10", worker_memory="1"
        ) as server:
            for _ in range(3):
                assert not fleet.update(server.url, 0).is_delta
            until_tidy(state, server.operator_url)
        assert counters(state)["build.retried"] == 1
        assert counters(state)["full_pull.build-failed"] == 3
        with running_server(
            state,
            upstream=registry,
            max_delta_ratio="10",
            constants={"obdelta.builds.verdicts.FAILURE_MEMORY": 0},
        ) as server:
            assert fleet.update(server.url, 0).is_delta
