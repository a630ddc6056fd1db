"""The real server: ``twistd obdelta`` as a separate process, on a free loopback port."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 40.0


_given: set[int] = set()
_chance = random.Random()


def free_port() -> int:
    """Returns a port that was free a moment ago, each time another one, below those that the
    kernel gives to connections (ip(7)). Each process of pytest-xdist has ports of its own.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = _chance.randrange(10_000 + own, 32_768, count)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


@dataclass
class RunningServer:
    """A started server; ``url`` is its address for devices."""

    process: subprocess.Popen[bytes]
    port: int
    state_dir: Path
    log_path: Path
    operator_url: str
    address: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def host(self) -> str:
        """Returns host and port as in image names."""
        return f"{self.address}:{self.port}"

    @property
    def log(self) -> str:
        """Returns its whole log so far."""
        return self.log_path.read_text("utf-8", "replace")

    @property
    def key_header(self) -> dict[str, str]:
        """The login of requests that change something: the key of ``state-dir``."""
        return {"Authorization": f"Bearer {(self.state_dir / 'operator-key').read_bytes().hex()}"}

    @property
    def attention(self) -> list[str]:
        """Returns the problems that need attention now, as the first page displays them."""
        url = f"{self.operator_url}/api/v1/status"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [str(problem["what"]) for problem in json.loads(answer.read())["attention"]]

    @property
    def settings_file(self) -> Path:
        """A settings file by which commands find this server, and its key (``-c``)."""
        file = self.state_dir.with_name(f"{self.state_dir.name}.conf")
        file.write_text(f"[obdelta]\nstate-dir = {self.state_dir}\n")
        return file

    def resident_bytes(self, field: str = "VmHWM") -> int:
        """Returns peak (``VmHWM``) or present (``VmRSS``) resident memory of the main process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text("ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server process is gone")


def launcher(constants: Mapping[str, float]) -> str:
    """Returns Python code that runs twistd with other values for module constants."""
    return f"""
import importlib, sys
for name, value in {dict(constants)!r}.items():
    module, _, constant = name.rpartition(".")
    getattr(importlib.import_module(module), constant)
    setattr(sys.modules[module], constant, value)
from twisted.scripts.twistd import run
sys.argv[0] = "twistd"
run()
"""


def command(*options: str, constants: Mapping[str, float] | None = None) -> list[str]:
    """Returns the command that runs ``twistd obdelta`` with this interpreter, without a pid file.
    ``constants``: values for module constants of the main process, such as
    ``obdelta.builds.queue.MAX_WAITING``.
    """
    twistd = [str(Path(sys.executable).with_name("twistd"))]
    if constants is not None:
        twistd = [sys.executable, "-c", launcher(constants)]
    return [*twistd, "-n", "--pidfile=", "obdelta", *options]


@contextmanager
def running_server(
    state_dir: Path,
    *,
    upstream: str,
    port: int | None = None,
    operator_port: int | None = None,
    environment: Mapping[str, str] | None = None,
    stop_with: signal.Signals = signal.SIGTERM,
    run: Callable[..., list[str]] = command,
    address: str = "127.0.0.1",
    constants: Mapping[str, float] | None = None,
    **options: str,
) -> Iterator[RunningServer]:
    """Starts it with ``auth = none`` unless told otherwise; keyword options are settings
    (``max_builds="1"``). ``run`` makes the command line of options. For ``constants`` see
    :func:`command`.

    At the end of the block it is stopped and must exit with 0 (unless it was killed).
    """
    if constants is not None:
        run = functools.partial(run, constants=constants)
    port, operator_port = port or free_port(), operator_port or free_port()
    given = {
        "listen": f"tcp:{port}:interface={address}",
        "public-url": f"http://{address}:{port}",
        "upstream": upstream,
        "state-dir": str(state_dir),
        "auth": "none",
        "drain": "3",
        "operator-listen": f"tcp:{operator_port}:interface={address}",
        **{key.replace("_", "-"): value for key, value in options.items()},
    }
    log_path = state_dir.parent / f"{state_dir.name}-{port}.log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OBDELTA_")}
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            run(*(f"--{key}={value}" for key, value in given.items())),
            stdout=log,
            stderr=log,
            env={**clean, **(environment or {})},
        )
        server = RunningServer(
            process, port, state_dir, log_path, f"http://{address}:{operator_port}", address
        )
        try:
            _wait_until_up(server)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(stop_with)
            try:
                status = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
    if stop_with is signal.SIGTERM and status not in (0, -signal.SIGKILL.value):
        raise AssertionError(f"the server ended with {status}:\n{server.log[-4000:]}")


def _wait_until_up(server: RunningServer) -> None:
    # Asked by the operators' endpoint: it opens last, and uses plain HTTP whatever the devices'
    # endpoint does.
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{server.operator_url}/healthz", timeout=5) as answer:
                answer.read()
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"the server did not come up ({error}):\n{server.log[-4000:]}"
                ) from error
            # Polled: no event reports that a process has opened its port.
            time.sleep(0.05)
