"""The quota against a client that requests and fetches deltas between all its images."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

from bench.images import file, make_image, make_layer, push
from bench.registry import serving
from tests.support.fault_fleet import Fleet, make_fleet, repository
from tests.support.server import RunningServer, running_server

IMAGES = 9
SIZE = 60_000
QUOTA = 3 * SIZE
HOSTILE = 100
"""Number of the first image of the hostile fleet."""


def make_hostile_fleet(directory: Path, registry: str) -> None:
    """Pushes images that have nothing in common: each delta is as large as its target."""
    source = random.Random(4)
    for number in range(IMAGES):
        layer = make_layer([file("bin/program", source.randbytes(SIZE))], directory / "blobs")
        push(make_image([layer], directory / "image"), registry, repository(HOSTILE + number))


def ask_and_fetch(server: RunningServer, base: int, target: int) -> bool:
    """Returns whether there was a delta. A fetched delta is protected by the grace."""
    names = [f"{server.host}/{repository(number)}" for number in (base, target)]
    try:
        with urllib.request.urlopen(
            f"{server.url}/api/v3/delta?src={names[0]}&dest={names[1]}", timeout=60
        ) as answer:
            name = json.loads(answer.read())["name"]
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == 504
            return False
    tag = name.rpartition(":")[2]
    if not tag.startswith("delta-"):
        return False
    with urllib.request.urlopen(
        f"{server.url}/v2/{repository(target)}/manifests/{tag}", timeout=60
    ) as answer:
        answer.read()
    return True


def fetch_once_built(server: RunningServer, base: int, target: int) -> None:
    """Retries while the delta is built, as devices do."""
    deadline = time.monotonic() + 60
    while not ask_and_fetch(server, base, target):
        assert time.monotonic() < deadline


def blob_bytes(state: Path) -> int:
    found = 0
    for path in (state / "blobs").rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # evicted
    return found


def test_one_fleet_does_not_fill_the_store(tmp_path: Path) -> None:
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 3)
        make_hostile_fleet(tmp_path, registry)
        with running_server(
            tmp_path / "state",
            upstream=registry,
            effort="fast",
            delta_compression="gzip",
            max_delta_ratio="10",
            store_quota=str(QUOTA),
            request_timeout="1",
            max_builds="1",
        ) as server:
            # Deltas to the same image have the same bytes here, so one to each is enough.
            pairs = list(pairwise(range(HOSTILE, HOSTILE + IMAGES)))
            most = 0
            for base, target in pairs:
                fetch_once_built(server, base, target)
                most = max(most, blob_bytes(server.state_dir))
            # The quota, and the bytes of the build in progress.
            assert QUOTA - SIZE < most < QUOTA + 2 * SIZE
            # The hostile fleet's own deltas were evicted for its new ones, though it had fetched
            # them.
            assert re.search(r"quota: \d+ bytes were evicted", server.log)
            # Another fleet gets its delta, though all others were fetched within the grace.
            deadline = time.monotonic() + 60
            while not ask_and_fetch(server, 0, 1):
                assert time.monotonic() < deadline
                ask_and_fetch(server, *random.Random(1).choice(pairs))
            assert Fleet(registry).update(server.url, 0).is_delta
            assert "Traceback" not in server.log
