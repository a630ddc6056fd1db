"""``python -m bench.load``: a fleet at once, and bytes per second beside nginx; writes
docs/load.md.

The fleet goes the whole way (token, v3 question, manifest, blobs, TLS), see :mod:`bench.devices`.
nginx, with Debian's settings, serves the very same file with the same certificate on the same cores
in the same run; Debian's wrk is the client of both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.devices import Herd, Outcome
from bench.images import Image, file, make_image, make_layer, push
from bench.registry import serving
from tests.support.server import RunningServer, free_port, running_server
from tests.support.tokens import Issuer, make_certificate, make_key, private_pem, pulls

BASE, TARGET = "v2/" + "a1" * 16, "v2/" + "b2" * 16
NAME = "localhost"
PAGE = Path(__file__).parent.parent / "docs/load.md"
_SAMPLE_SECONDS = 0.5


@dataclass(slots=True)
class Load:
    """What a fleet's updates took. ``peaks``: bytes of resident memory, the server's processes (the
    first one first).
    """

    devices: int
    processes: int
    delta_bytes: int
    outcome: Outcome
    builds: int
    peaks: list[int] = field(default_factory=list)


def images(work: Path, size: int) -> tuple[Image, Image]:
    """Two releases: the second one has ``size`` bytes that nobody can compress, and some of the
    first one's.
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
    """A server with tokens and TLS before a real registry that has both releases; the CA (its own
    certificate) last.
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
    """So many devices at once, from the question to the last byte."""
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
    told = work / "herd.json"
    told.write_text(json.dumps(asdict(herd)))
    with _watching(running) as seen:
        ran = subprocess.run(
            [sys.executable, "-m", "bench.devices", str(told)],
            stdout=subprocess.PIPE,
            check=True,
            timeout=seconds + 60,
        )
    outcome = Outcome(**json.loads(ran.stdout))
    log = running.log
    built = re.findall(r"build: pair=.* outcome=(\w+)", log)
    sizes = [int(found) for found in re.findall(r"outcome=ready full=\d+ delta=(\d+)", log)]
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
    while running.log.count(" serves (pid ") < processes - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all processes serve:\n{running.log[-2000:]}")
        time.sleep(0.05)


@contextmanager
def _watching(running: RunningServer) -> Iterator[dict[int, tuple[str, int]]]:
    """Peaks of the server's children, by process id, looked at until the end of the block."""
    seen: dict[int, tuple[str, int]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            seen.update(_children(running.process.pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.update(_children(running.process.pid))


def _children(parent: int) -> dict[int, tuple[str, int]]:
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            ):
                peak = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = (command, int(peak[1]) * 1024 if peak else 0)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


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
    """One delta's large layer from both, turn by turn."""
    with server(work, size, processes) as (running, issuer, ca):
        token = issuer.token(pulls(BASE, TARGET))
        herd_load = _fleet(work, running, issuer, ca, 1, processes, 120)
        if herd_load.outcome.verified != 1:
            raise RuntimeError(f"no delta: {herd_load.outcome}")
        largest = max((work / "state/blobs").rglob("?" * 64), key=lambda path: path.stat().st_size)
        with _nginx(work, largest, processes) as (url, master):
            own = f"https://{NAME}:{running.port}/v2/{TARGET}/blobs/sha256:{largest.name}"
            rates = []
            for number in range(2 * rounds):
                keep = number % 2 == 0
                measured = []
                for address, parent, extra in (
                    (url, master, []),
                    (own, running.process.pid, [f"Authorization: Bearer {token}"]),
                ):
                    measured.append(_wrk(address, parent, extra, keep, seconds, connections))
                (theirs, their_cpu), (ours, our_cpu) = measured
                rates.append(Rate(keep, theirs, ours, their_cpu, our_cpu))
            return rates


@contextmanager
def _nginx(work: Path, served: Path, workers: int) -> Iterator[tuple[str, int]]:
    """Debian's nginx with what Debian sets (sendfile, tcp_nopush, no access log here as there is
    none of bytes there).
    """
    root, port = work / "www", free_port()
    root.mkdir(mode=0o755)
    shutil.copyfile(served, root / "blob")
    (root / "blob").chmod(0o644)
    for folder in (work, root):
        folder.chmod(0o755)
    folders = "".join(
        f"{name}_temp_path {work}/nginx-{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = work / "nginx.conf"
    config.write_text(
        f"user root; daemon off; worker_processes {workers}; pid {work}/nginx.pid; error_log"
        f" {work}/nginx.log;\nevents {{ worker_connections 4096; }}\nhttp {{ sendfile on;"
        f" tcp_nopush on; access_log {work}/nginx-access.log; {folders}\nssl_protocols TLSv1.2"
        f" TLSv1.3; ssl_prefer_server_ciphers on;\nserver {{ listen 127.0.0.1:{port} ssl; root"
        f" {root};\nssl_certificate {work}/server.pem; ssl_certificate_key {work}/server.key; }}"
        " }\n"
    )
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "nginx", "-c", str(config)]
    ) as process:
        try:
            deadline = time.monotonic() + 10
            while len(_children(process.pid)) < workers:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx did not start: {(work / 'nginx.log').read_text()}")
                time.sleep(0.05)
            yield f"https://{NAME}:{port}/blob", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def _wrk(
    url: str, parent: int, headers: Sequence[str], keep: bool, seconds: int, connections: int
) -> tuple[float, float]:
    given = [*headers, *([] if keep else ["Connection: close"])]
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}",
        *(word for each in given for word in ("-H", each)),
        url,
    ]
    before = _cpu(parent)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = _cpu(parent) - before
    found = re.search(r"in ([\d.]+)s, ([\d.]+)(\w*B) read", said)
    if found is None or "Non-2xx" in said:
        raise RuntimeError(f"wrk: {said}")
    read = float(found[2]) * {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}[found[3]] / 1e6
    return read / float(found[1]), read / used


def _cpu(parent: int) -> float:
    """Processor seconds of a process and those of its children that are servers."""
    ticks = 0
    servers = [
        pid for pid, (command, _) in _children(parent).items() if "obdelta.builds" not in command
    ]
    for pid in [parent, *servers]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# -- the page ----------------------------------------------------------------------------------


def page(load: Load, rates: Sequence[Rate], began: float) -> str:
    """docs/load.md. ``began``: the machine's load average then."""
    outcome, mib = load.outcome, 1 << 20
    lines = [
        "# Load",
        "",
        "`make bench-load` writes this page; do not edit it.",
        (
            f"It was measured on {time.strftime('%Y-%m-%d', time.gmtime())} with"
            f" {len(os.sched_getaffinity(0))} cores for server, registry and clients together (load"
            f" average at the start: {began:.1f})."
        ),
        "",
        "## A fleet at once",
        "",
        "All devices start at the same moment, before the delta exists.",
        (
            "Each one asks `/api/v3/delta` and pulls the image that the answer names, as"
            " balena-engine does."
        ),
        (
            "It requests ping, manifest, config and layers one after another, each over a new TLS"
            " connection."
        ),
        "Each device has its own token and compares every digest.",
        "The upstream is Debian's `docker-registry`.",
        "",
        "| | |",
        "|---|---:|",
        f"| devices | {load.devices:,} |",
        f"| verified | {outcome.verified:,} |",
        f"| delta | {load.delta_bytes:,} bytes |",
        f"| builds | {load.builds} |",
        f"| answers 502 or 504 (retried) | {outcome.asked_again:,} |",
        (
            "| layers, and whole pulls, restarted after a dropped connection |"
            f" {outcome.resumed:,}, {outcome.pulled_again:,} |"
        ),
        f"| bytes delivered | {outcome.bytes:,} |",
        f"| seconds | {outcome.seconds:.0f} |",
        f"| bytes per second | {outcome.bytes / outcome.seconds / 1e6:,.0f} MB |",
        *(
            f"| peak resident memory, process {number} of {load.processes} | {peak / mib:,.0f}"
            " MiB |"
            for number, peak in enumerate(load.peaks, 1)
        ),
        "",
        "## Beside nginx",
        "",
        (
            "Both servers deliver the delta's large layer: obdelta with `processes ="
            f" {load.processes}`, and Debian's nginx."
        ),
        "nginx has as many workers, `sendfile on`, the same certificate, and TLS 1.3.",
        (
            "The client is Debian's `wrk` with one thread on the same cores; the two servers take"
            " turns."
        ),
        "MB are 10^6 bytes.",
        "",
        (
            "| connections | nginx MB/s | obdelta MB/s | ratio | nginx MB per processor second |"
            " obdelta | ratio |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for keep in (True, False):
        some = [rate for rate in rates if rate.keep_alive is keep]
        if not some:
            continue
        theirs, ours, their_cpu, our_cpu = (
            statistics.median(getattr(rate, name) for rate in some)
            for name in ("nginx", "obdelta", "nginx_cpu", "obdelta_cpu")
        )
        ratio = statistics.median(rate.obdelta / rate.nginx for rate in some)
        lines.append(
            f"| {'kept alive' if keep else 'a new one each'} | {theirs:,.0f} | {ours:,.0f} |"
            f" {ratio:.2f} | {their_cpu:,.0f} | {our_cpu:,.0f} | {our_cpu / their_cpu:.2f} |"
        )
    lines += [
        "",
        (
            f"Values are medians of {len(rates) // 2} turns each; the ratio is the median of the"
            " turns' ratios."
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Gives the exit status: 1 when a goal is missed."""
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
