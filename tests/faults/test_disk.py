"""A disk that is far too small: builds fail cleanly or are tried once more, room is made, readiness
tells, service goes on.

The disk is a real one, of memory, in a namespace of its own: it goes with the server, and no rights
are needed for it.
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
from obdelta.errors import ServerFault
from tests.support.fault_fleet import (
    PATIENCE,
    Fleet,
    Tally,
    check_store,
    give_up,
    make_fleet,
    repository,
    until_tidy,
)
from tests.support.server import command, free_port

UPDATES = 10
ROUNDS = 4
SEED = 64
MEGABYTES = 12
_MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'


@dataclass
class SmallDisk:
    """A server whose ``state-dir`` is a disk of its own; ``state`` is where others see it."""

    url: str
    operators: str
    state: Path
    log: Path

    def ready(self) -> tuple[int, str]:
        """What readiness says."""
        try:
            with urllib.request.urlopen(f"{self.operators}/readyz", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def until_ready(self, status: int) -> str:
        """Polls it: what was found is good for a few seconds."""
        deadline = time.monotonic() + PATIENCE
        while (said := self.ready())[0] != status:
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        return said[1]


@contextmanager
def server_on_a_small_disk(
    directory: Path, registry: str, megabytes: int, inodes: int = 0
) -> Iterator[SmallDisk]:
    """With a quota that is far larger than the disk. ``inodes``: how many the
    disk has, if bounded.
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
        "worth": "10",
        "grace": "0",
        "failure-memory": "0",
    }
    twistd = command(*(f"--{name}={value}" for name, value in options.items()))
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
            time.sleep(0.05)  # there is nothing to be notified by


def fill(state: Path) -> Path:
    """Leaves no byte."""
    ballast = state / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return ballast


def run_full_at_any_write(directory: Path, rounds: int, tally: Tally, seed: int = SEED) -> None:
    """Somebody else leaves a random number of bytes, and takes them back while a build goes on;
    then there is room again.
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
    """A v2 delta, to its end: its bytes. Raises OSError."""
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
    """Several times what fits goes over the disk; then nothing fits at all for a while."""
    with serving(directory / "registry") as registry:
        make_fleet(directory, registry, updates + 2, size=700_000)
        fleet = Fleet(registry)
        with server_on_a_small_disk(directory, registry, MEGABYTES) as small:
            for number in range(updates):
                assert fleet.update_again(small.url, number, 10, tally).is_delta
                tally.add("updates verified on a small disk")
            until_tidy(small.state, small.operators)
            tally.add("times the disk was full", small.log.read_text().count("the disk is full: "))
            # Somebody else takes all of it, and what is kept has been given up already.
            give_up(small.operators)
            ballast = fill(small.state)
            give_up(small.operators)
            fill(small.state)
            with pytest.raises((ServerFault, OSError)):
                fleet.update(small.url, updates, deadline=0)
            tally.add("updates without a delta because of the full disk")
            fill(small.state)
            said = small.until_ready(503)
            assert "the disk is full" in said or "cannot be written" in said
            until_tidy(small.state, small.operators)
            ballast.unlink()
            small.until_ready(200)
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
