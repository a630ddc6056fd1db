"""nginx with one file, wrk as its client, and the processor time of servers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import free_port

NAME = "localhost"


def children(parent: int) -> dict[int, tuple[str, int]]:
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


@contextmanager
def running_nginx(work: Path, served: Path, workers: int) -> Iterator[tuple[str, int]]:
    """Runs Debian's nginx with Debian's settings (sendfile, tcp_nopush), without an access log."""
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
            while len(children(process.pid)) < workers:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx did not start: {(work / 'nginx.log').read_text()}")
                time.sleep(0.05)
            yield f"https://{NAME}:{port}/blob", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def wrk(
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
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = _cpu(parent) - before
    found = re.search(r"in ([\d.]+)s, ([\d.]+)(\w*B) read", output)
    if found is None or "Non-2xx" in output:
        raise RuntimeError(f"wrk: {output}")
    read = float(found[2]) * {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}[found[3]] / 1e6
    return read / float(found[1]), read / used


def _cpu(parent: int) -> float:
    """Returns the processor seconds of a process and of its children that are servers."""
    ticks = 0
    servers = [
        pid for pid, (command, _) in children(parent).items() if "obdelta.builds" not in command
    ]
    for pid in [parent, *servers]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
