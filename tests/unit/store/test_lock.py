"""The lock of a state directory, between processes."""

from __future__ import annotations

import fcntl
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
async def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    first = StateLock.take(tmp_path)
    with pytest.raises(StateInUse, match=r"a server, or by a command.*: stop it, or set another"):
        StateLock.take(tmp_path)
    await first.release()
    await StateLock.take(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_the_folder_is_locked_although_the_file_is_gone(tmp_path: Path) -> None:
    first = StateLock.take(tmp_path)
    assert first.problem() is None
    (tmp_path / NAME).unlink()
    assert "lock was removed from state-dir" in (first.problem() or "")
    with pytest.raises(StateInUse):
        StateLock.take(tmp_path)
    # The attempt created a new file, which is not the locked one.
    assert (tmp_path / NAME).exists()
    assert "or replaced" in (first.problem() or "")
    await first.release()
    await first.release()
    second = StateLock.take(tmp_path)
    assert second.problem() is None
    await second.release()


@pytest_twisted.ensureDeferred
async def test_an_older_version_that_locks_only_the_file_is_kept_away(tmp_path: Path) -> None:
    taken = StateLock.take(tmp_path)
    with (tmp_path / NAME).open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await taken.release()
    with (tmp_path / NAME).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(StateInUse):
            StateLock.take(tmp_path)
    await StateLock.take(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(StateInUse):
            StateLock.take(tmp_path)
        process.kill()
    await StateLock.take(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_a_read_only_file_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / NAME).touch(0o444)
    await StateLock.take(tmp_path).release()
