"""Finds the process of a server that serves a connection, in the kernel's own tables."""

from __future__ import annotations

import http.client
import json
import sqlite3
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from tests.support.server import RunningServer

T = TypeVar("T")
_SECONDS = 60.0


def until(what: str, found: Callable[[], T], seconds: float = _SECONDS) -> T:
    """Returns the value of ``found`` once it is true. It polls, because other processes send no
    event.
    """
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


def builds(server: RunningServer) -> list[dict[str, object]]:
    """The builds that are queued or running."""
    with urllib.request.urlopen(f"{server.operator_url}/api/v1/builds", timeout=30) as answer:
        found: list[dict[str, object]] = json.load(answer)["builds"]
    return found


def until_both_forms(server: RunningServer, pairs: int = 1) -> None:
    """Waits until the other form of so many v3 deltas has been built, too, and nothing is built."""
    path = f"file:{server.state_dir / 'catalogue.sqlite'}?mode=ro"

    def built() -> bool:
        with closing(sqlite3.connect(path, uri=True)) as connection:
            found = connection.execute("SELECT form FROM deltas WHERE kind = 'v3'").fetchall()
        wanted = ["gzip"] * pairs + ["zstd"] * pairs
        return sorted(form for (form,) in found) == wanted and not builds(server)

    until("both forms are built", built)


def further(server: RunningServer) -> list[int]:
    """Returns the process IDs of the server's additional server processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == server.process.pid and b"obdelta.app.server_process" in command:
                found.append(int(folder.name))
    return sorted(found)


def serving(server: RunningServer, wanted: int) -> list[int]:
    """Returns the same once this number of them serve."""
    until(
        f"{wanted} serve",
        lambda: server.log.count(" is ready (pid ") >= wanted and len(further(server)) == wanted,
    )
    return further(server)


def resident_bytes(pid: int, field: str = "VmHWM") -> int:
    """Returns peak (``VmHWM``) or present (``VmRSS``) resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} is gone")


def connection_to(server: RunningServer, pid: int) -> http.client.HTTPConnection:
    """Returns a connection that this process has accepted; the caller closes it.

    A connection to another process is closed at once: a process drops those that are far above the
    limit of one address.
    """
    for _ in range(1000):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.connect()
        if _owner(server, connection) == pid:
            return connection
        connection.close()
        time.sleep(0.01)  # the other process must notice that it is closed
    raise AssertionError(f"process {pid} accepts nothing")


def _owner(server: RunningServer, connection: http.client.HTTPConnection) -> int:
    inode = _inode(connection.sock.getsockname()[1], server.port)
    candidates = [server.process.pid, *further(server)]

    def owner() -> int:
        return next((pid for pid in candidates if inode in _sockets(pid)), 0)

    return until("somebody accepts", owner)


def _inode(client: int, port: int) -> str:
    def find() -> str:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if (
                fields[1].endswith(f":{port:04X}")
                and fields[2].endswith(f":{client:04X}")
                and fields[9] != "0"
            ):
                return f"socket:[{fields[9]}]"
        return ""

    return until("the connection is accepted", find)


def _sockets(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    return found
