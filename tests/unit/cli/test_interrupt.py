"""Ctrl-C and SIGTERM during every long command: one line, the usual status, nothing left behind."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as installed

from obdelta.store.catalogue.catalogue import Catalogue
from tests.support.interrupting import assert_ended, silent_server, started
from tests.support.processes import until

REACTOR: Any = installed
PAIR = ["registry.example.com/v2/base", "registry.example.com/v2/target"]
DEVICE = [*PAIR, "--server", "URL", "--registry", "URL"]
ASKING = {
    "status": ["--operator", "URL"],
    "builds": ["--operator", "URL"],
    "gc": ["--operator", "URL"],
    "prune": ["--operator", "URL"],
    "prepare": [*PAIR, "--operator", "URL"],
    "explain": [*PAIR, "--operator", "URL"],
    "export": [*PAIR, "--operator", "URL", "-o", "OUT"],
    "export --server": [*DEVICE, "-o", "OUT"],
    "export --upstream": [*PAIR, "--upstream", "URL", "-o", "OUT"],
    "build": [*PAIR, "--upstream", "URL", "-o", "OUT"],
    "check": DEVICE,
}


BOTH = [("build", signal.SIGTERM), ("check", signal.SIGTERM)]


@pytest.mark.parametrize(("name", "sent"), [*product(ASKING, [signal.SIGINT]), *BOTH])
def test_ctrl_c_while_waiting_for_a_server(name: str, sent: signal.Signals, tmp_path: Path) -> None:
    with silent_server() as (url, requested):
        known = {"URL": url, "OUT": tmp_path / "out"}
        arguments = [known.get(argument, argument) for argument in ASKING[name]]
        with started(tmp_path, name.partition(" ")[0], *arguments) as process:
            requested.wait(60)
            if name in ("build", "check"):
                assert len(list(tmp_path.rglob("*"))) > 1  # there is something to clean up
            assert_ended(process, sent)


def test_ctrl_c_while_reading_standard_input(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    base = tmp_path / "base"
    with base.open("wb") as file:
        file.truncate(1 << 40)
    with started(folder, "patch", base, "-", "-o", folder / "out") as process:
        until("its output is begun", lambda: list(folder.glob(".out.*")))
        assert_ended(process, signal.SIGINT)
    (folder / "tmp").rmdir()
    with started(folder, "diff", base, base, "-o", folder / "out") as process:
        until("its output is begun", lambda: list(folder.glob(".out.*")))
        assert_ended(process, signal.SIGINT)


@pytest_twisted.ensureDeferred
async def test_ctrl_c_while_hashing_a_large_file(tmp_path: Path) -> None:
    """An hour of work: the command does not even wait for the current piece."""
    state, folder = tmp_path / "state", tmp_path / "folder"
    folder.mkdir()
    state.mkdir()
    await (await Catalogue.open(state / "catalogue.sqlite", REACTOR)).close()
    place = state / "blobs/sha256/aa" / ("aa" * 32)
    place.parent.mkdir(parents=True)
    with place.open("wb") as file:
        file.truncate(1 << 40)
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue, catalogue:
        catalogue.execute("INSERT INTO blobs (digest, size) VALUES (?, ?)", ("aa" * 32, 1 << 40))
    with started(folder, "verify", "--no-proof", "--state-dir", state) as process:
        until("it reads the file", lambda: str(place) in opened(process.pid))
        assert_ended(process, signal.SIGINT)


def opened(pid: int) -> list[str]:
    """Returns the open files of a process."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found
