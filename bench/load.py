"""``python -m bench.load``: many devices at once, and bytes per second compared with nginx; writes
docs/load.md.

The devices make complete updates (token, v3 request, manifest, blobs, TLS), see
:mod:`bench.devices`. nginx, with Debian's settings, serves the same file with the same certificate
on the same cores in the same run; Debian's wrk is the client of both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.devices import Herd, Outcome
from bench.images import Image, file, make_image, make_layer, push
from bench.load_page import page
from bench.nginx import NAME, children, running_nginx, wrk
from bench.registry import serving
from tests.support.server import RunningServer, free_port, running_server
from tests.support.tokens import Issuer, make_certificate, make_key, private_pem, pulls

BASE, TARGET = "v2/" + "a1" * 16, "v2/" + "b2" * 16
PAGE = Path(__file__).parent.parent / "docs/load.md"
_SAMPLE_SECONDS = 0.5


@dataclass(slots=True)
class Load:
    """Measurements of a fleet's updates. ``peaks``: bytes of resident memory, the server's
    processes (the first one first).
    """

    devices: int
    processes: int
    delta_bytes: int
    outcome: Outcome
    builds: int
    peaks: list[int] = field(default_factory=list)


def images(work: Path, size: int) -> tuple[Image, Image]:
    """Returns two releases: the second one has ``size`` incompressible bytes, and some bytes of
    the first one.
    """
    source = random.Random(6)
    old = source.randbytes(max(size // 3, 1024))
    base = make_layer([file("app/data", old)], work / "blobs", compression="plain")
    target = make_layer(
        [file("app/data", old), file("app/new", source.randbytes(size))],
        work / "blobs",
        compression="plain",
    )
    return make_image([base], work / "base"), make_image([target], work / "target")


@contextmanager
def server(work: Path, size: int, processes: int) -> Iterator[tuple[RunningServer, Issuer, Path]]:
    """Yields a server with tokens and TLS, before a real registry that has both releases; the CA
    (its own certificate) comes last.
    """
    issuer, key = Issuer(), make_key("ES256")
    (work / "server.pem").write_bytes(make_certificate(key, NAME))
    (work / "server.key").write_bytes(private_pem(key))
    with ExitStack() as stack:
        registry = stack.enter_context(serving(work / "registry"))
        for image, repository in zip(images(work, size), (BASE, TARGET), strict=True):
            push(image, registry, repository)
        port = free_port()
        running = stack.enter_context(
            running_server(
                work / "state",
                upstream=registry,
                port=port,
                public_url=f"https://{NAME}:{port}",
                auth="token",
                auth_key=str(issuer.write(work)),
                auth_issuer=issuer.issuer,
                auth_audience=issuer.audience,
                auth_realm="https://api.example.com/auth/v1/token",
                upstream_credentials="none",
                tls_certificate=str(work / "server.pem"),
                tls_key=str(work / "server.key"),
                processes=str(processes),
            )
        )
        yield running, issuer, work / "server.pem"


def fleet(work: Path, *, devices: int, size: int, processes: int, seconds: float) -> Load:
    """Runs this number of devices at once, from the request to the last byte."""
    with server(work, size, processes) as (running, issuer, ca):
        return _fleet(work, running, issuer, ca, devices, processes, seconds)


def _fleet(
    work: Path,
    running: RunningServer,
    issuer: Issuer,
    ca: Path,
    devices: int,
    processes: int,
    seconds: float,
) -> Load:
    _wait_for(running, processes)
    herd = Herd(
        port=running.port,
        name=NAME,
        ca=str(ca),
        question=(
            f"/api/v3/delta?src={NAME}:{running.port}/{BASE}&dest={NAME}:{running.port}/{TARGET}"
        ),
        tokens=[
            issuer.token(pulls(BASE, TARGET), subject=f"d_{number:032x}")
            for number in range(devices)
        ],
        seconds=seconds,
    )
    message = work / "herd.json"
    message.write_text(json.dumps(asdict(herd)))
    with _watching(running) as seen:
        ran = subprocess.run(
            [sys.executable, "-m", "bench.devices", str(message)],
            stdout=subprocess.PIPE,
            check=True,
            timeout=seconds + 60,
        )
    outcome = Outcome(**json.loads(ran.stdout))
    log = running.log
    # The devices read gzip; the zstd form is built once more, after it.
    built = re.findall(r"build: pair=.* form=gzip outcome=(\w+)", log)
    sizes = [
        int(found) for found in re.findall(r"form=gzip outcome=ready full=\d+ delta=(\d+)", log)
    ]
    faces = [peak for command, peak in seen.values() if "obdelta.app.server_process" in command]
    return Load(
        devices=devices,
        processes=processes,
        delta_bytes=sizes[0] if sizes else 0,
        outcome=outcome,
        builds=len(built),
        peaks=[running.resident_bytes(), *faces],
    )


def _wait_for(running: RunningServer, processes: int) -> None:
    deadline = time.monotonic() + 30
    while running.log.count(" is ready (pid ") < processes - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all processes serve:\n{running.log[-2000:]}")
        time.sleep(0.05)


@contextmanager
def _watching(running: RunningServer) -> Iterator[dict[int, tuple[str, int]]]:
    """Yields the peak memory of the server's children by process ID, updated until the end of the
    block.
    """
    seen: dict[int, tuple[str, int]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            seen.update(children(running.process.pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.update(children(running.process.pid))


# -- beside nginx ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """MB (10^6 bytes) a second of both, and MB a second of processor time that each server took."""

    keep_alive: bool
    nginx: float
    obdelta: float
    nginx_cpu: float
    obdelta_cpu: float


def beside_nginx(
    work: Path, *, size: int, processes: int, rounds: int, seconds: int, connections: int
) -> list[Rate]:
    """Measures downloads of one delta's large layer from both servers, in turns."""
    with server(work, size, processes) as (running, issuer, ca):
        token = issuer.token(pulls(BASE, TARGET))
        herd_load = _fleet(work, running, issuer, ca, 1, processes, 120)
        if herd_load.outcome.verified != 1:
            raise RuntimeError(f"no delta: {herd_load.outcome}")
        largest = max((work / "state/blobs").rglob("?" * 64), key=lambda path: path.stat().st_size)
        with running_nginx(work, largest, processes) as (url, master):
            own = f"https://{NAME}:{running.port}/v2/{TARGET}/blobs/sha256:{largest.name}"
            rates = []
            for number in range(2 * rounds):
                keep = number % 2 == 0
                measured = []
                for address, parent, extra in (
                    (url, master, []),
                    (own, running.process.pid, [f"Authorization: Bearer {token}"]),
                ):
                    measured.append(wrk(address, parent, extra, keep, seconds, connections))
                (nginx, their_cpu), (ours, our_cpu) = measured
                rates.append(Rate(keep, nginx, ours, their_cpu, our_cpu))
            return rates


# -- the page ----------------------------------------------------------------------------------


def main() -> int:
    """Returns the exit status: 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="after which the fleet is given up"
    )
    parser.add_argument("--no-page", action="store_true", help="print it only")
    options = parser.parse_args()
    size, began = options.megabytes << 20, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="obdelta-load-") as scratch:
        rates = []
        if options.rounds:
            (work := Path(scratch) / "nginx").mkdir()
            rates = beside_nginx(
                work,
                size=size,
                processes=options.processes,
                rounds=options.rounds,
                seconds=6,
                connections=16,
            )
        (work := Path(scratch) / "fleet").mkdir()
        load = fleet(
            work,
            devices=options.devices,
            size=size,
            processes=options.processes,
            seconds=options.seconds,
        )
    text = page(load, rates, began)
    print(text)
    print(load.outcome.errors or "no errors", load.outcome.drops or "")
    if not options.no_page:
        PAGE.write_text(text)
    good = (
        load.outcome.verified == load.devices and load.builds == 1 and max(load.peaks) <= 300 << 20
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
