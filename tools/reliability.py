"""Measures docs/reliability.md: ``python -m tools.reliability [TIMES]``.

Runs the fault suite with TIMES times as many faults as the tests (2 by default), and writes
docs/reliability.md: which faults were injected, and how often. Any error ends the run and leaves
the page unchanged.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import (
    test_clients,
    test_disk,
    test_kills,
    test_redis,
    test_tenants,
    test_upstream,
    test_worker_kills,
    test_workers,
)
from tests.support.fault_fleet import Tally
from tests.unit.store import test_ownership

PAGE = Path(__file__).parent.parent / "docs/reliability.md"
HEAD = """# Reliability

This page counts faults that were injected into real servers, with Debian's docker-registry as the \
upstream.
`make reliability` writes it.
It runs `tests/faults/` with {times} times as many faults as `make test`.
This run took {minutes:.0f} minutes on {machine}.
After each fault three things are checked:

1. **No wrong byte was served.** Devices verify everything that they get, down to the \
target's diff_ids.
   They pull everything except deltas directly from the registry.
   Every stored file whose name is a digest is compared with this digest.
2. **Nothing is left over.** After the last build `tmp/` is empty.
3. **The next request succeeds.** A device gets its delta and updates to its target.
"""
PARTS: tuple[tuple[str, str, Callable[[Path, int, Tally], None], int], ...] = (
    (
        "kill -9",
        (
            "Two servers are killed while a device updates, and started again on the same"
            " state.\nEach update is between a new pair of images.\nA kill happens at a file"
            " operation, at a step of the build or the push, or at a random moment (from a"
            " seed).\nOne of the servers also pushes its deltas into the registry (`publish ="
            " registry`).\n*Published* counts kills after the build has ended, while the device"
            " requests the manifest or downloads.\n*Push* and *pushed* count kills during the push"
            " and after it."
        ),
        test_kills.run_kills,
        test_kills.KILLS,
    ),
    (
        "Worker processes",
        (
            "Devices update, two at a time.\nAt a random moment during a build, a worker process"
            " (a child process that builds) is killed."
        ),
        test_workers.run_worker_kills,
        test_workers.KILLS,
    ),
    (
        "The upstream",
        (
            "Devices update, three at a time.\nThe registry's answers are cut, slowed down, or"
            " changed in one bit, at random bytes of every connection."
        ),
        test_upstream.run_upstream_faults,
        test_upstream.UPDATES,
    ),
    (
        "Devices",
        (
            "Eight devices at a time disconnect (half of them by a reset), stall, and resume at"
            " random offsets.\nThey download blobs that are being fetched, layers of a finished"
            " delta, and evicted layers that are rebuilt."
        ),
        test_clients.run_clients,
        test_clients.DEVICES,
    ),
    (
        "A small disk",
        (
            f"`state-dir` is a file system of {test_disk.MEGABYTES} MiB, with a quota of 20 GiB.\n"
            "The updates write several times this size.\n"
            "Then another program fills the disk: the build fails, and `/readyz` reports it.\n"
            "Once there is space again, the server continues."
        ),
        test_disk.run_small_disk,
        test_disk.UPDATES,
    ),
    (
        "A disk that is full at any write",
        (
            "Another program leaves a random number of bytes free, up to 500,000, while a v2 or a"
            " v3 delta is built.\nThen this program takes the rest, too.\nA build that"
            " meets the full disk frees a quarter of the store and is retried once, or fails"
            " cleanly."
        ),
        test_disk.run_full_at_any_write,
        test_disk.ROUNDS,
    ),
    (
        "Foreign directories",
        (
            "`state-dir` names another program's directory, with `tmp/`, `layers/`, `trees/`,"
            " `upstream/` and `blobs/` in it.\nThe server does not start, and nothing"
            " changes.\nThen the operator marks the directory as obdelta's, and the server"
            " starts.\nEvery file, directory and link that was there before is compared."
        ),
        test_ownership.run_foreign_folders,
        test_ownership.FOLDERS,
    ),
    (
        "Tenants",
        (
            "Two fleets use one server, which builds one delta at a time.\n"
            "One fleet attacks: it asks for all pairs of its images, first as one device and then"
            " as many devices.\n"
            "It also sends expensive images, malformed requests, stalls, requests that it "
            "abandons, names of other hosts, and all of this at once.\n"
            "It fills the store, pulls evicted layers, and deletes images with the other fleet's "
            "contents.\n"
            "The other fleet updates.\n"
            '"Updates held up" are those whose build waited for more than '
            f"{test_tenants.LIMIT_BEFORE} builds of the hostile fleet."
        ),
        test_tenants.run_tenants,
        test_tenants.UPDATES,
    ),
    (
        "Redis poisoned",
        (
            "Another program writes to the Redis that replicas share.\n"
            "It writes leases without expiry, deltas that do not exist, invalid data, and a"
            " verdict.\n"
            "Then a device updates between the pair of images that these keys name.\n"
            "A verdict leads to a full pull until its key is removed."
        ),
        test_redis.run_poisoned_redis,
        test_redis.UPDATES,
    ),
    (
        "Frontends and workers killed",
        (
            "Two frontends and four workers (`obdelta worker`) run on machines of their own"
            " (network namespaces), with one Redis and one registry.\n"
            "A frontend, a worker or Redis is killed at a random moment while three devices"
            " update.\n"
            "Leases last 4 seconds, and a worker counts as dead after 6 seconds without a"
            " heartbeat.\n"
            "A longer run had 100 kills: `run_machine_kills(dir, 100, tally, seed=100)`, 1,333 s on"
            " a busy machine.\n"
            "It killed workers 59 times, frontends 28 times and Redis 13 times.\n"
            "All 300 devices ended verified, each by a delta.\n"
            "The workers built 199 deltas once, and one delta twice.\n"
            "All 1,721 stored files matched their digests."
        ),
        test_worker_kills.run_machine_kills,
        test_worker_kills.KILLS,
    ),
)


def section(title: str, what: str, run: Callable[[Path, int, Tally], None], count: int) -> str:
    """Runs a part; returns its section of the page."""
    tally = Tally()
    print(f"-- {title}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), count, tally)
    tally.show()
    rows = "".join(f"| {name} | {number:,} |\n" for name, number in sorted(tally.counts.items()))
    return f"\n## {title}\n\n{what}\n\n| what | how often |\n|---|---:|\n{rows}"


def main() -> None:
    """Runs all parts, one after another."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    started = time.monotonic()
    sections = [section(title, what, run, count * times) for title, what, run, count in PARTS]
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    head = HEAD.format(times=times, machine=machine, minutes=(time.monotonic() - started) / 60)
    PAGE.write_text(head + "".join(sections), "utf-8")


if __name__ == "__main__":
    main()
