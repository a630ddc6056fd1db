"""Seconds from a release to its last delta: a real server before a real registry, with builds in
the server or in workers.

One image has many releases in the field. All deltas to the newest one are asked for at once, as
when a fleet's release was finalized. Their contents are the standard library of the Python that
runs this.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.images import Image, make_image, push
from bench.layers import Entry, file, from_tree, make_layer, tidied
from bench.registry import serving
from tests.support.processes import until
from tests.support.redis import running_redis
from tests.support.server import RunningServer, running_server
from tests.support.workers import worker_command

SOURCES = 40
"""Releases in the field."""
LAYER = 16 << 20
"""Bytes of the layer that changes."""
CHANGED = 20
"""Files that differ from one release to the next."""
WORKER_CORES = 0.4
"""The share of a core that each worker may use, so that four of them stand for four small machines.
Without this limit one worker already uses all cores.
"""
GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000
"""Microseconds over which the kernel enforces the limit."""
RUN_SECONDS = 3600.0
"""Maximum seconds of a run."""
TARGET = "v2/" + "f" * 32


@dataclass(frozen=True, slots=True)
class Run:
    """One release: ``seconds`` until all deltas were ready, ``each`` of the builds, with so many
    ``builds`` at a time, in as many ``workers`` (0: in the server itself). ``load``: the machine's
    load average at the start.
    """

    builds: int
    seconds: float
    each: list[float]
    load: float
    workers: int = 0

    @property
    def per_hour(self) -> float:
        """Builds an hour."""
        return 3600 * len(self.each) / self.seconds


def measure(
    folder: Path, builds: Sequence[int], workers: Sequence[int], sources: int = SOURCES
) -> list[Run]:
    """Returns one run for each number of builds at a time, and of workers. Each has a registry and
    states of its own.
    """
    images = _make_releases(folder, sources)
    runs: list[Run] = []
    plans = [(count, False) for count in builds] + [(count, True) for count in workers]
    for count, apart in plans:
        place = folder / f"run-{len(runs)}"
        with serving(place / "registry") as registry:
            for number, image in enumerate(images):
                push(image, registry, _repository(number, sources))
            with ExitStack() as running:
                server, states = _start(running, place, registry, count, apart=apart)
                load = os.getloadavg()[0]
                began = time.monotonic()
                _prepare(server, [_repository(number, sources) for number in range(sources)])
                seconds = time.monotonic() - began
        each = [found for state in states for found in _build_seconds(state)]
        if len(each) != sources:
            raise RuntimeError(f"{len(each)} of {sources} deltas were built")
        runs.append(Run(count, seconds, each, load, count if apart else 0))
        what = "workers" if apart else "builds at a time"
        print(f"{count} {what}: {seconds:.1f} s, {runs[-1].per_hour:.0f} builds an hour")
    return runs


def _start(
    running: ExitStack, place: Path, registry: str, count: int, *, apart: bool
) -> tuple[RunningServer, list[Path]]:
    """Starts a server, with workers that build one delta at a time if they are ``apart``. Returns
    it, and the state directories of those that build.
    """
    if not apart:
        state = place / "state"
        server = running_server(state, upstream=registry, max_builds=str(count))
        return running.enter_context(server), [state]
    shared = running.enter_context(running_redis(place / "redis"))
    given: dict[str, Any] = {
        "upstream": registry,
        "environment": {"OBDELTA_SHARED": shared.url},
        "upstream_credentials": "none",
    }
    states = [place / f"worker-{number}" for number in range(count)]
    for number, state in enumerate(states):
        group = running.enter_context(limited_group(f"obdelta-bench-{os.getpid()}-{number}"))

        def run(*options: str, group: Path = group) -> list[str]:
            join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
            return ["sh", "-c", join, "sh", *worker_command(*options)]

        running.enter_context(running_server(state, run=run, max_builds="1", **given))
    return running.enter_context(running_server(place / "state", builds="workers", **given)), states


@contextmanager
def limited_group(name: str, cores: float = WORKER_CORES) -> Iterator[Path]:
    """Yields a control group (version 1 or 2) whose processes use at most so many ``cores``.

    Raises OSError without the right to make one.
    """
    quota = int(cores * PERIOD)
    if (GROUPS / "cgroup.controllers").exists():
        (GROUPS / "cgroup.subtree_control").write_text("+cpu")
        group, limit = GROUPS / name, ("cpu.max", f"{quota} {PERIOD}")
    else:
        group, limit = GROUPS / "cpu" / name, ("cpu.cfs_quota_us", str(quota))
    group.mkdir()
    try:
        (group / limit[0]).write_text(limit[1])
        yield group
    finally:
        until("its processes have ended", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _build_seconds(state: Path) -> list[float]:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue:
        rows = catalogue.execute("SELECT max(seconds) FROM deltas GROUP BY base").fetchall()
    return [float(row[0]) for row in rows]


def _repository(number: int, sources: int) -> str:
    return TARGET if number == sources else f"v2/{number:032x}"


def _make_releases(folder: Path, sources: int) -> list[Image]:
    """Returns the releases, newest last."""
    entries = _application()
    made = []
    for number in range(sources + 1):
        layer = make_layer(_release(entries, number), folder / "blobs", level=1, tidy=False)
        labels = {"release": str(number)}
        made.append(make_image([layer], folder / f"image-{number}", labels=labels))
    return made


def _application() -> list[Entry]:
    found, size = [], 0
    for entry in tidied(list(from_tree(Path(sysconfig.get_path("stdlib")), "app", mtime=1))):
        if size > LAYER:
            break
        if "__pycache__" not in entry.info.name and "site-packages" not in entry.info.name:
            found.append(entry)
            size += entry.info.size
    return found


def _release(entries: list[Entry], number: int) -> list[Entry]:
    """Returns the application as of one release: each has other lines in some of its files."""
    texts = [at for at, entry in enumerate(entries) if entry.info.name.endswith(".py")]
    release = list(entries)
    for at in texts[number * CHANGED % len(texts) :][:CHANGED]:
        content = entries[at].content
        raw = content.read_bytes() if isinstance(content, Path) else content
        if isinstance(raw, bytes):
            line = b"\nRELEASE = %d\n" % number
            release[at] = file(entries[at].info.name, raw + line, mtime=2)
    return release


def _prepare(server: RunningServer, bases: list[str]) -> None:
    """Asks for all deltas, and waits until they are ready."""
    pairs = [{"src": base, "dest": TARGET} for base in bases]
    body = json.dumps({"pairs": pairs}).encode()
    begun = _call(server, "/api/v1/prepare", body)["id"]

    def are_ready() -> bool:
        states = {job["state"] for job in _call(server, f"/api/v1/prepare/{begun}")["jobs"]}
        if states - {"waiting", "building", "ready"}:
            raise RuntimeError(f"not every delta could be built: {states}")
        return states == {"ready"}

    until("all deltas are ready", are_ready, seconds=RUN_SECONDS)


def _call(server: RunningServer, path: str, body: bytes | None = None) -> Any:
    headers = {**server.key_header, "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.operator_url}{path}", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
