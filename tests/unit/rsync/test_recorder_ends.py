"""Recorders that stall, are cancelled or killed, or lose their server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock, deferLater

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import WorkerFailed
from obdelta.rsync.recorder_process import Limits, RecordedStream, RsyncRun
from tests.support.recorded_pair import Pair, install, pair, reactor, rsync_instead, until

__all__ = ["pair", "rsync_instead"]


class Reactor(Clock):
    """A reactor with real processes and the test's clock."""

    def spawnProcess(self, *arguments: Any, **options: Any) -> Any:
        return reactor.spawnProcess(*arguments, **options)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


class Stuck:
    """A run whose rsync never ends; its process ID is in ``pid``."""

    def __init__(self, pair: Pair, bin: Path, limits: Limits) -> None:
        self._pid_file = pair.directory / "pid"
        install(
            bin,
            f"echo $$ > {self._pid_file}.new; mv {self._pid_file}.new {self._pid_file};"
            " trap '' TERM; while :; do sleep 1000; done",
        )
        self.pair, self.reactor = pair, Reactor()
        self.sizes: list[int] = []
        run = RsyncRun(cast(IReactor, self.reactor), limits)
        self.running: Deferred[RecordedStream] = ensureDeferred(
            run.run(pair.order(), grew=lambda size, _: self.sizes.append(size))
        )

    async def started(self) -> Stuck:
        await until(lambda: self._pid_file.exists() and self.sizes)
        self.pid = int(self._pid_file.read_text())
        self.group = os.getpgid(self.pid)
        return self

    async def gone(self) -> None:
        """Asserts that neither processes nor files of it are left."""
        await until(lambda: not alive(self.pid) and not alive(self.group))
        assert not (self.pair.directory / "scratch").exists()


@pytest_twisted.ensureDeferred
async def test_a_stalled_rsync_is_killed(pair: Pair, rsync_instead: Path) -> None:
    stuck = await Stuck(pair, rsync_instead, Limits(idle=60, total=1000)).started()
    stuck.reactor.advance(59)
    assert not stuck.running.called and alive(stuck.pid)
    stuck.reactor.advance(1)
    with pytest.raises(WorkerFailed, match="nothing for 60 seconds"):
        await stuck.running
    await stuck.gone()
    assert stuck.reactor.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_a_slow_rsync_is_killed(pair: Pair, rsync_instead: Path) -> None:
    stuck = await Stuck(pair, rsync_instead, Limits(idle=2000, total=1000)).started()
    stuck.reactor.advance(1000)
    with pytest.raises(WorkerFailed, match="more than 1000 seconds"):
        await stuck.running
    await stuck.gone()


@pytest_twisted.ensureDeferred
async def test_a_cancelled_recorder_ends_its_rsync(pair: Pair, rsync_instead: Path) -> None:
    stuck = await Stuck(pair, rsync_instead, Limits()).started()
    stuck.running.cancel()
    with pytest.raises(CancelledError):
        await stuck.running
    await stuck.gone()
    assert stuck.reactor.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_a_process_that_ignores_sigterm_is_killed(pair: Pair, rsync_instead: Path) -> None:
    stuck = await Stuck(pair, rsync_instead, Limits(idle=60, grace=10)).started()
    os.kill(stuck.group, signal.SIGSTOP)  # the recorder itself: SIGTERM waits
    stuck.reactor.advance(60)
    stuck.reactor.advance(9)
    await deferLater(reactor, 0.1)
    assert not stuck.running.called and alive(stuck.group)
    stuck.reactor.advance(1)
    with pytest.raises(WorkerFailed, match="nothing for 60 seconds"):
        await stuck.running
    await until(lambda: not alive(stuck.pid))


@pytest_twisted.ensureDeferred
async def test_a_killed_recorder_is_an_error(pair: Pair, rsync_instead: Path) -> None:
    stuck = await Stuck(pair, rsync_instead, Limits()).started()
    os.killpg(stuck.group, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="ended before"):
        await stuck.running


@pytest_twisted.ensureDeferred
async def test_a_recorder_ends_with_its_server(pair: Pair, rsync_instead: Path) -> None:
    """Standard input ends: the server that wanted the stream is gone."""
    reports = pair.directory / "pid"
    install(
        rsync_instead,
        f"echo $$ > {reports}.new; mv {reports}.new {reports};"
        " trap '' TERM; while :; do sleep 1000; done",
    )
    order = pair.order()
    job = {
        name: str(value)
        for name, value in order._asdict().items()
        if name in ("base", "target", "out", "scratch")
    }
    job |= {"docker_config": None, "level": 6, "block": 512, "forecast": False, "niceness": 0}  # type: ignore[dict-item]
    with subprocess.Popen(
        [sys.executable, "-m", "obdelta.rsync.recorder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as recorder:
        assert recorder.stdin is not None
        recorder.stdin.write(json.dumps(job).encode() + b"\n")
        recorder.stdin.flush()
        await until(reports.exists)
        recorder.stdin.close()
        assert recorder.wait(20) == -signal.SIGKILL
    await until(lambda: not alive(int(reports.read_text())))


def test_a_recorder_starts_nothing_for_a_server_that_ended(pair: Pair) -> None:
    """The server may have been killed while the child was starting, and another one runs by now."""
    order = pair.order()
    job = {
        name: str(value)
        for name, value in order._asdict().items()
        if name in ("base", "target", "out", "scratch")
    }
    job |= {
        "docker_config": None,  # type: ignore[dict-item]
        "level": 6,  # type: ignore[dict-item]
        "block": 512,  # type: ignore[dict-item]
        "forecast": False,  # type: ignore[dict-item]
        "niceness": 0,  # type: ignore[dict-item]
        "parent": os.getppid(),  # type: ignore[dict-item]
    }
    done = subprocess.run(
        [sys.executable, "-m", "obdelta.rsync.recorder"],
        input=json.dumps(job).encode() + b"\n",
        check=False,
    )
    assert done.returncode == 1
    assert not order.out.exists()
    assert not order.scratch.exists()


def test_streams_are_in_a_private_folder(pair: Pair) -> None:
    """The trees may hold secrets."""
    assert stat.S_IMODE(pair.base.parent.stat().st_mode) == 0o700
