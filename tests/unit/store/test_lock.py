"""Who uses a state directory: the lock, between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.errors import StateInUse
from obdelta.store.lock import NAME, StateLock

TAKE = """
import pathlib, sys
from obdelta.store.lock import StateLock
taken = StateLock.take(pathlib.Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest_twisted.ensureDeferred
async def test_one_has_it_and_who_comes_second_waits_for_nobody(tmp_path: Path) -> None:
    first = StateLock.take(tmp_path)
    with pytest.raises(StateInUse, match="a server, or by a command"):
        StateLock.take(tmp_path)
    await first.release()
    await StateLock.take(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_it_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(StateInUse):
            StateLock.take(tmp_path)
        process.kill()
    await StateLock.take(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_a_file_that_may_only_be_read_will_do(tmp_path: Path) -> None:
    (tmp_path / NAME).touch(0o444)
    await StateLock.take(tmp_path).release()
