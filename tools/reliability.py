"""usage: python -m tools.reliability [TIMES]

Runs the fault suite TIMES times as long as the tests do (2 by default), and writes docs/reliability.md: what was done to
servers, and how often. Whatever goes wrong ends it, and leaves the page as it is.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import (
    test_faults_clients,
    test_faults_disk,
    test_faults_kills,
    test_faults_redis,
    test_faults_tenants,
    test_faults_upstream,
    test_faults_workers,
    test_store_ownership,
)
from tests.parts.fault_fleet import Tally

PAGE = Path(__file__).parent.parent / "docs/reliability.md"
HEAD = """# Reliability

What was done to real servers before Debian's real docker-registry, and how often; written by `make reliability`, which runs
the tests `tests/test_faults_*.py` {times} times as long as every test run does ({machine}, {minutes:.0f} minutes). After each
fault three things are checked:

1. **No wrong byte was served.** Devices verify all that they get, down to the target's diff_ids, and have everything that is
   not the server's doing from the registry itself. Every file that is kept under a digest is compared with it.
2. **Nothing is left.** When nothing is built any more, `tmp/` is empty.
3. **The next ask succeeds.** A device gets its delta, and gets to its target.
"""
PARTS: tuple[tuple[str, str, Callable[[Path, int, Tally], None], int], ...] = (
    (
        "kill -9",
        "Two servers, each killed while a device updates and started again on the same state, each time with a new pair: at a\n"
        "file operation, at a step of the build or the push, or at a moment that a seed decides. One of them also pushes its\n"
        "deltas into the registry (`publish = registry`). *Published* are kills after a build's end, *push* and *pushed* those\n"
        "in the push and after it; then the device asks for the manifest, or downloads.",
        test_faults_kills.run_kills,
        test_faults_kills.KILLS,
    ),
    (
        "Workers",
        "Devices update, two at a time; at a random moment while a build is under way, a worker process is killed.",
        test_faults_workers.run_worker_kills,
        test_faults_workers.KILLS,
    ),
    (
        "The upstream",
        "What the registry says is cut, slowed down, or changed in one bit, at random bytes of every connection, while devices\n"
        "update, three at a time.",
        test_faults_upstream.run_upstream_faults,
        test_faults_upstream.UPDATES,
    ),
    (
        "Devices",
        "Devices leave (half of them by a reset), ask and never read, and go on at random offsets, eight at a time: of blobs\n"
        "that are being fetched, of a finished delta's layers, and of layers that were given up and are made again.",
        test_faults_clients.run_clients,
        test_faults_clients.DEVICES,
    ),
    (
        "A small disk",
        f"`state-dir` is a file system of {test_faults_disk.MEGABYTES} MiB, with a quota of 20 GiB: several times what fits\n"
        "goes over it. Then somebody else takes all of it: the build fails, `/readyz` says so, and once there is room again,\n"
        "all goes on.",
        test_faults_disk.run_small_disk,
        test_faults_disk.UPDATES,
    ),
    (
        "A disk that is full at any write",
        "Somebody else leaves a random number of bytes, up to 500,000, while a v2 or a v3 delta is built, then all of them.\n"
        "A build that meets the full disk frees a quarter of what is kept and is tried once more, or fails cleanly.",
        test_faults_disk.run_full_at_any_write,
        test_faults_disk.ROUNDS,
    ),
    (
        "Foreign folders",
        "`state-dir` names a folder of somebody else's, with `tmp/`, `layers/`, `trees/`, `upstream/` and `blobs/` in it. The\n"
        "server does not start, and nothing changes. Then the operator marks the folder as obdelta's: the server starts, and\n"
        "every file, folder and link that was there before is compared.",
        test_store_ownership.run_foreign_folders,
        test_store_ownership.FOLDERS,
    ),
    (
        "Tenants",
        "Two fleets on one server, which builds one delta at a time. One fleet attacks: all pairs of its images, as one device\n"
        "and as many, images that are much work, malformed requests, stalls, and all of it at once. The other one updates.\n"
        "*Held up* is an update whose build waited for more than "
        f"{test_faults_tenants.MOST_BEFORE} builds of the hostile fleet.",
        test_faults_tenants.run_tenants,
        test_faults_tenants.UPDATES,
    ),
    (
        "Redis poisoned",
        "Something else writes to the Redis that replicas share: leases without end, deltas that are nowhere, nonsense, a\n"
        "verdict. Then a device updates that very pair. A verdict leads to a full pull until its key is removed.",
        test_faults_redis.run_poisoned_redis,
        test_faults_redis.UPDATES,
    ),
)


def section(title: str, what: str, run: Callable[[Path, int, Tally], None], count: int) -> str:
    """Runs a part, and tells of it."""
    tally = Tally()
    print(f"-- {title}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), count, tally)
    tally.show()
    rows = "".join(f"| {name} | {number:,} |\n" for name, number in sorted(tally.counts.items()))
    return f"\n## {title}\n\n{what}\n\n| what | how often |\n|---|---:|\n{rows}"


def main() -> None:
    """Everything, one part after another."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    started = time.monotonic()
    sections = [section(title, what, run, count * times) for title, what, run, count in PARTS]
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    head = HEAD.format(times=times, machine=machine, minutes=(time.monotonic() - started) / 60)
    PAGE.write_text(head + "".join(sections), "utf-8")


if __name__ == "__main__":
    main()
