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
taken = getattr(StateLock, sys.argv[1])(pathlib.Path(sys.argv[2]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest_twisted.ensureDeferred
async def test_servers_share_it_and_who_wants_it_alone_waits_for_nobody(tmp_path: Path) -> None:
    first, second = StateLock.shared(tmp_path), StateLock.shared(tmp_path)
    with pytest.raises(StateInUse, match="a server, or another command, uses it"):
        StateLock.alone(tmp_path)
    await first.release()
    with pytest.raises(StateInUse):
        StateLock.alone(tmp_path)
    await second.release()
    alone = StateLock.alone(tmp_path)
    with pytest.raises(StateInUse, match="obdelta gc"):
        StateLock.shared(tmp_path)
    await alone.release()
    await StateLock.shared(tmp_path).release()


@pytest.mark.parametrize("kind", ["shared", "alone"])
@pytest_twisted.ensureDeferred
async def test_it_ends_with_its_process(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", TAKE, kind, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(StateInUse):
            StateLock.alone(tmp_path)
        process.kill()
    await StateLock.alone(tmp_path).release()


@pytest_twisted.ensureDeferred
async def test_a_file_that_may_only_be_read_will_do(tmp_path: Path) -> None:
    (tmp_path / NAME).touch(0o444)
    await StateLock.alone(tmp_path).release()
