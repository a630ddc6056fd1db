"""A disk that is far too small: builds fail cleanly or are retried once, space is freed, readiness
reports it, service continues.

The disk is a real one in memory, in a separate namespace: it disappears with the server, and needs
no privileges.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.registry import serving
from obdelta.device.http import ServerFault
from tests.support.fault_fleet import (
    PATIENCE,
    Fleet,
    Tally,
    check_store,
    evict_layers,
    make_fleet,
    repository,
    until_ready,
    until_tidy,
)
from tests.support.server import command, free_port

UPDATES = 10
ROUNDS = 4
SEED = 64
MEGABYTES = 9
_MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'


@dataclass
class SmallDisk:
    """A server whose ``state-dir`` is a separate disk; other processes see it at ``state``."""

    url: str
    operators: str
    state: Path
    log: Path


@contextmanager
def server_on_a_small_disk(
    directory: Path, registry: str, megabytes: int, inodes: int = 0
) -> Iterator[SmallDisk]:
    """Runs a server whose quota is far larger than the disk. ``inodes``: the disk's number of
    inodes, if limited.
    """
    state, log = directory / "small", directory / "small.log"
    state.mkdir()
    port, operators = free_port(), free_port()
    options = {
        "listen": f"tcp:{port}:interface=127.0.0.1",
        "operator-listen": f"tcp:{operators}:interface=127.0.0.1",
        "public-url": f"http://127.0.0.1:{port}",
        "upstream": registry,
        "state-dir": str(state),
        "auth": "none",
        "effort": "fast",
        "max-delta-ratio": "10",
        "keep-served": "0",
    }
    twistd = command(
        *(f"--{name}={value}" for name, value in options.items()),
        constants={"obdelta.builds.verdicts.FAILURE_MEMORY": 0},
    )
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*namespace, f"size={megabytes}m,nr_inodes={inodes}", str(state), *twistd],
            stdout=out,
            stderr=out,
        )
    try:
        seen = Path(f"/proc/{process.pid}/root{state}")
        small = SmallDisk(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{operators}", seen, log)
        _until_up(small, process)
        yield small
        process.terminate()
        assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _until_up(small: SmallDisk, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"{small.operators}/healthz", timeout=PATIENCE) as answer:
                answer.read()
                return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, small.log.read_text()[
                -3000:
            ]
            time.sleep(0.05)  # no event reports this


def fill(state: Path) -> Path:
    """Fills the disk completely."""
    ballast = state / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return ballast


def run_full_at_any_write(directory: Path, rounds: int, tally: Tally, seed: int = SEED) -> None:
    """Another program leaves a random number of bytes, and takes them while a build runs; then
    there is space again.
    """
    source = random.Random(seed)
    with serving(directory / "registry") as registry:
        make_fleet(directory, registry, rounds + 2, size=200_000)
        fleet = Fleet(registry)
        with server_on_a_small_disk(directory, registry, MEGABYTES) as small:
            for number in range(rounds):
                ballast = fill(small.state)
                os.truncate(ballast, ballast.stat().st_size - source.randrange(500_000))
                with contextlib.suppress(ServerFault, OSError):
                    if number % 2:
                        fleet.update(small.url, number, deadline=0)
                    else:
                        fetch_batch(small.url, number)
                    tally.add("deltas that still fitted")
                until_tidy(small.state, small.operators)
                ballast.unlink()
                assert fleet.update_again(small.url, number, 10, tally).is_delta
                assert fetch_batch(small.url, number)
                tally.add("full disks after which the service continued")
            until_tidy(small.state, small.operators)
            tally.add("times the disk was full", small.log.read_text().count("the disk is full: "))
            assert "Traceback" not in small.log.read_text()
            tally.add("files compared with their digests", check_store(small.state))


def fetch_batch(server: str, number: int) -> int:
    """Downloads a v2 delta to its end; returns its bytes. Raises OSError."""
    host = server.partition("//")[2]
    base, target = (f"{host}/{repository(image)}" for image in (number, number + 1))
    try:
        ask = urllib.request.urlopen(
            f"{server}/api/v2/delta?src={base}&dest={target}&wait=true", timeout=PATIENCE
        )
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 300:
                raise
            location = error.headers["location"]
    else:
        with ask:
            raise AssertionError(f"{ask.status} is no answer")
    with urllib.request.urlopen(location, timeout=PATIENCE) as answer:
        expected, body = answer.headers["content-length"], answer.read()
    assert expected is None or len(body) == int(expected)
    return len(body)


def run_small_disk(directory: Path, updates: int, tally: Tally) -> None:
    """Writes several times the disk's size; then nothing fits for a while."""
    with serving(directory / "registry") as registry:
        make_fleet(directory, registry, updates + 2, size=700_000)
        fleet = Fleet(registry)
        with server_on_a_small_disk(directory, registry, MEGABYTES) as small:
            for number in range(updates):
                assert fleet.update_again(small.url, number, 10, tally).is_delta
                tally.add("updates verified on a small disk")
            until_tidy(small.state, small.operators)
            tally.add("times the disk was full", small.log.read_text().count("the disk is full: "))
            # Another program takes all the space, and kept content is evicted already.
            evict_layers(small.state, small.operators)
            ballast = fill(small.state)
            evict_layers(small.state, small.operators)
            fill(small.state)
            with pytest.raises((ServerFault, OSError)):
                fleet.update(small.url, updates, deadline=0)
            tally.add("updates without a delta because of the full disk")
            fill(small.state)
            message = until_ready(small.operators, 503)
            assert "the disk is full" in message or "cannot be written" in message
            until_tidy(small.state, small.operators)
            ballast.unlink()
            until_ready(small.operators, 200)
            assert fleet.update_again(small.url, updates, 10, tally).is_delta
            tally.add("full disks after which the service continued")
            until_tidy(small.state, small.operators)
            tally.add("files compared with their digests", check_store(small.state))


def test_a_disk_that_is_far_too_small(tmp_path: Path) -> None:
    tally = Tally()
    run_small_disk(tmp_path, UPDATES, tally)
    tally.show()
    assert tally.counts["times the disk was full"] >= 2


def test_a_disk_that_is_full_at_any_write(tmp_path: Path) -> None:
    tally = Tally()
    run_full_at_any_write(tmp_path, ROUNDS, tally)
    tally.show()
    assert tally.counts["full disks after which the service continued"] == ROUNDS
