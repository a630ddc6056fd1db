"""Servers that are killed at random moments during a build and after it, and started again."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obdelta.device.http import ServerFault
from tests.support.fault_fleet import PATIENCE, Fleet, Tally, check_store, until_tidy
from tests.support.server import free_port

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = 90
"""The approximate number of a server's file operations for one pair, from the request to the last
byte.
"""
CHANGES = 12
"""The greatest number of steps of a build and a push."""
MILLISECONDS = 450.0


class Victims:
    """The program that forks the servers to kill, and its one running child."""

    def __init__(self, registry: str, state: Path, **options: str) -> None:
        self.state = state
        self._options = {"upstream": registry, "state-dir": str(state), **options}
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fault_victim"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.pid = 0
        self.url = self.operators = ""
        self.log = state.parent / f"{state.name}.log"

    def _read(self) -> None:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            self._lines.put(line.decode("ascii").strip())

    def start(self, kill: tuple[str, int]) -> None:
        """Starts a server and waits until it is up."""
        port, operators = free_port(), free_port()
        self.url, self.operators = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{operators}"
        options = {
            "listen": f"tcp:{port}:interface=127.0.0.1",
            "operator-listen": f"tcp:{operators}:interface=127.0.0.1",
            "public-url": self.url,
            "auth": "none",
            "effort": "fast",
            "max-delta-ratio": "10",
            "drain": "1",
            **self._options,
        }
        request = json.dumps({"options": options, "kill": kill, "log": str(self.log)})
        assert self._program.stdin is not None
        self._program.stdin.write(f"{request}\n".encode("ascii"))
        self._program.stdin.flush()
        self.pid = int(self._until("pid ").rpartition(" ")[2])
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.ask("/healthz")
                return
            except (urllib.error.URLError, ConnectionError) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(
                        f"it did not come up ({error}):\n{self.log_end()}"
                    ) from error
                time.sleep(0.01)  # no event reports this

    def arm(self) -> None:
        """Starts to count the server's operations, or steps."""
        os.kill(self.pid, signal.SIGUSR1)
        self._until("armed")

    def kill(self) -> None:
        """Kills the server now; if it is dead already, its process ID is not reused before its end
        was reported.
        """
        os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> tuple[str, int]:
        """Waits for its end; returns the stage of its build, and its status."""
        stage = "idle"
        while True:
            line = self._line()
            if line.startswith("stage "):
                stage = line.removeprefix("stage ")
            elif line.startswith("ended "):
                return stage, int(line.removeprefix("ended "))

    def ask(self, path: str) -> Any:
        """Returns the JSON answer of the operators' endpoint to a path."""
        with urllib.request.urlopen(f"{self.operators}{path}", timeout=PATIENCE) as answer:
            body = answer.read()
            return (
                json.loads(body)
                if answer.headers.get_content_type() == "application/json"
                else body
            )

    def log_end(self) -> str:
        """Returns the end of its log."""
        return self.log.read_text("utf-8", "replace")[-3000:] if self.log.exists() else ""

    def close(self) -> None:
        """Ends the program."""
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(PATIENCE)

    def _until(self, head: str) -> str:
        while not (line := self._line()).startswith(head):
            assert not line.startswith("ended "), f"{line}:\n{self.log_end()}"
        return line

    def _line(self) -> str:
        return self._lines.get(timeout=PATIENCE)


@contextmanager
def victims(registry: str, state: Path, **options: str) -> Iterator[Victims]:
    """Yields the program for the block."""
    running = Victims(registry, state, **options)
    try:
        yield running
    finally:
        if running.pid and Path(f"/proc/{running.pid}").exists():
            running.kill()
        running.close()


@dataclass
class Chain:
    """One server after another on one state, each killed while it builds the next pair; ``first``
    is the first pair's number.
    """

    fleet: Fleet
    running: Victims
    seed: int
    first: int

    def run(self, kills: int, tally: Tally) -> None:
        """Runs the chain; raises any error."""
        source = random.Random(self.seed)
        known: set[tuple[str, int]] = set()
        for number in range(self.first, self.first + kills):
            kind = source.choice(("operation", "operation", "change", "time"))
            at = source.randrange(1, {"operation": OPERATIONS, "change": CHANGES, "time": 2}[kind])
            self.running.start(("never", 0) if kind == "time" else (kind, at))
            if number > self.first:
                self._check_recovery(number - 1, tally)
            self.running.arm()
            stage = self._killed(
                number, source.uniform(0, MILLISECONDS / 1000) if kind == "time" else None, tally
            )
            tally.add(f"kills: {stage}")
            tally.add("kills")
            tally.add("files compared with their digests", check_store(self.running.state, known))
        self.running.start(("never", 0))
        self._check_recovery(self.first + kills - 1, tally)
        os.kill(self.running.pid, signal.SIGTERM)
        assert self.running.ended()[1] == 0
        tally.add("files compared with their digests", check_store(self.running.state))

    def _check_recovery(self, number: int, tally: Tally) -> None:
        """Checks after a kill: the next request succeeds, and nothing is left of the interrupted
        work.
        """
        update = self.fleet.update(self.running.url, number)
        assert update.is_delta, self.running.log_end()
        until_tidy(self.running.state, self.running.operators)
        tally.add("updates verified after a kill")

    def _killed(self, number: int, after: float | None, tally: Tally) -> str:
        """Lets a device send a request, and kills the server meanwhile; returns the stage."""
        failed: list[BaseException] = []

        def device() -> None:
            try:
                self.fleet.update(self.running.url, number, timeout=PATIENCE, deadline=0)
            except (ServerFault, OSError):
                tally.add("devices that were cut off")
            except BaseException as error:
                failed.append(error)
            else:
                tally.add("devices that had finished before the kill")

        asking = threading.Thread(target=device)
        asking.start()
        asking.join(after)  # the moment is an input of the test, and no event is waited for
        if asking.is_alive() and after is None:
            asking.join(PATIENCE)
        self.running.kill()
        stage, status = self.running.ended()
        asking.join(PATIENCE)
        assert not asking.is_alive()
        assert status == -signal.SIGKILL, f"{status}:\n{self.running.log_end()}"
        if failed:
            raise failed[0]
        return stage
