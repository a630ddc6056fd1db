"""Servers that are killed at random moments of a build and of what comes after it, and started
again.
"""

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

from obdelta.errors import ServerFault
from tests.support.fault_fleet import PATIENCE, Fleet, Tally, check_store, until_tidy
from tests.support.server import free_port

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = 90
"""About as many file operations does a server do for one pair, from the question to the last byte.
"""
CHANGES = 12
"""And so many steps do a build and a push take at most."""
MILLISECONDS = 450.0


class Victims:
    """The program that forks what is to be killed, and the one child that runs."""

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
            "worth": "10",
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
                    raise AssertionError(f"it did not come up ({error}):\n{self.said()}") from error
                time.sleep(0.01)  # there is nothing to be notified by

    def arm(self) -> None:
        """From now on its operations, or steps, count."""
        os.kill(self.pid, signal.SIGUSR1)
        self._until("armed")

    def kill(self) -> None:
        """Now; it may be dead already, but is not reaped before its end was told."""
        os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> tuple[str, int]:
        """Waits for its end: the stage that its build was in, and its status."""
        stage = "idle"
        while True:
            line = self._line()
            if line.startswith("stage "):
                stage = line.removeprefix("stage ")
            elif line.startswith("ended "):
                return stage, int(line.removeprefix("ended "))

    def ask(self, path: str) -> Any:
        """Of the operators' endpoint."""
        with urllib.request.urlopen(f"{self.operators}{path}", timeout=PATIENCE) as answer:
            body = answer.read()
            return (
                json.loads(body)
                if answer.headers.get_content_type() == "application/json"
                else body
            )

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text("utf-8", "replace")[-3000:] if self.log.exists() else ""

    def close(self) -> None:
        """Ends the program."""
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(PATIENCE)

    def _until(self, head: str) -> str:
        while not (line := self._line()).startswith(head):
            assert not line.startswith("ended "), f"{line}:\n{self.said()}"
        return line

    def _line(self) -> str:
        return self._lines.get(timeout=PATIENCE)


@contextmanager
def victims(registry: str, state: Path, **options: str) -> Iterator[Victims]:
    """For the length of a block."""
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
        """Raises whatever went wrong."""
        source = random.Random(self.seed)
        known: set[tuple[str, int]] = set()
        for number in range(self.first, self.first + kills):
            kind = source.choice(("operation", "operation", "change", "time"))
            at = source.randrange(1, {"operation": OPERATIONS, "change": CHANGES, "time": 2}[kind])
            self.running.start(("never", 0) if kind == "time" else (kind, at))
            if number > self.first:
                self._is_well(number - 1, tally)
            self.running.arm()
            stage = self._killed(
                number, source.uniform(0, MILLISECONDS / 1000) if kind == "time" else None, tally
            )
            tally.add(f"kills: {stage}")
            tally.add("kills")
            tally.add("files compared with their digests", check_store(self.running.state, known))
        self.running.start(("never", 0))
        self._is_well(self.first + kills - 1, tally)
        os.kill(self.running.pid, signal.SIGTERM)
        assert self.running.ended()[1] == 0
        tally.add("files compared with their digests", check_store(self.running.state))

    def _is_well(self, number: int, tally: Tally) -> None:
        """After a kill: the next ask succeeds, and nothing is left of what was cut off."""
        update = self.fleet.update(self.running.url, number)
        assert update.is_delta, self.running.said()
        until_tidy(self.running.state, self.running.operators)
        tally.add("updates verified after a kill")

    def _killed(self, number: int, after: float | None, tally: Tally) -> str:
        """A device asks, and the server dies under its hands; gives back in which stage."""
        failed: list[BaseException] = []

        def device() -> None:
            try:
                self.fleet.update(self.running.url, number, timeout=PATIENCE, deadline=0)
            except (ServerFault, OSError):
                tally.add("devices that were cut off")
            except BaseException as error:
                failed.append(error)
            else:
                tally.add("devices that were finished before")

        asking = threading.Thread(target=device)
        asking.start()
        asking.join(after)  # the moment is the test's input, not something that is waited for
        if asking.is_alive() and after is None:
            asking.join(PATIENCE)
        self.running.kill()
        stage, status = self.running.ended()
        asking.join(PATIENCE)
        assert not asking.is_alive()
        assert status == -signal.SIGKILL, f"{status}:\n{self.running.said()}"
        if failed:
            raise failed[0]
        return stage
