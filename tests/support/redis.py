"""Debian's real ``redis-server`` on a free loopback port; it can be stopped, stalled and started
again.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import free_port

_START_SECONDS = 60.0


class RunningRedis:
    """A Redis that stores nothing on disk: after a restart it is empty, as a cache is."""

    def __init__(self, root: Path, options: Sequence[str], address: str, *, tls: bool) -> None:
        self.port, self._options, self._root, self.address, self._tls = (
            free_port(),
            list(options),
            root,
            address,
            tls,
        )
        self._process: subprocess.Popen[bytes] | None = None
        root.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://{self.address}:{self.port}/0"

    def start(self) -> None:
        """Starts it on the same port as before."""
        port = ["--port", "0", "--tls-port"] if self._tls else ["--port"]
        self._process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "redis-server",
                *port,
                str(self.port),
                "--bind",
                self.address,
                "--save",
                "",
                "--dir",
                str(self._root),
                "--protected-mode",
                "no",
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection((self.address, self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, (
                    "redis-server did not start"
                )
                time.sleep(0.01)  # another process opens its port

    def stop(self) -> None:
        """Stops it; all its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stall(self, stalled: bool) -> None:
        """Stops or continues the process: its connections stay, without answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if stalled else signal.SIGCONT)

    def ask(self, *words: str) -> str:
        """Returns the output of redis-cli."""
        command = ["redis-cli", "-h", self.address, "-p", str(self.port), "--raw", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()


@contextmanager
def running_redis(
    root: Path, *options: str, address: str = "127.0.0.1", tls: bool = False
) -> Iterator[RunningRedis]:
    """Runs a Redis for the block."""
    redis = RunningRedis(root, options, address, tls=tls)
    try:
        redis.start()
        yield redis
    finally:
        redis.stop()
