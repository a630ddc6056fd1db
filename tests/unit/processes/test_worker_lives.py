"""Worker processes: when they start, and when they end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import LayerInvalid, WorkerFailed
from obdelta.processes import worker_pool as pool_module
from obdelta.processes.worker_main import Json
from obdelta.processes.worker_pool import WorkerPool
from tests.support.counting import CountedBytes
from tests.support.waiting import eventually
from tests.support.web import reactor
from tests.support.worker_jobs import TAR, endless_job, import_job, pool_of, tar_of, until_read


@pytest_twisted.ensureDeferred
async def test_a_worker_is_replaced_after_a_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "JOBS_PER_WORKER", 2)
    async with pool_of(1) as pool:
        seen = []
        for _ in range(4):
            running = ensureDeferred(pool.run(import_job(tmp_path), seconds=30))
            seen.append(max(pool.pids))
            await running
        assert seen[0] == seen[1]
        assert seen[2] == seen[3]
        assert seen[0] != seen[2]


@pytest_twisted.ensureDeferred
async def test_after_a_failure_all_workers_restart(tmp_path: Path) -> None:
    """The job may have failed for lack of memory, and the heap that earlier jobs left is too small
    for a second attempt.
    """
    async with pool_of(2) as pool:
        both: list[Deferred[Json]] = [
            ensureDeferred(pool.run(import_job(tmp_path, name=name), seconds=30))
            for name in ("one", "two")
        ]
        for one in both:
            await one
        used = set(pool.pids)
        assert len(used) == 2
        with pytest.raises(WorkerFailed, match="KeyError"):
            await pool.run({"task": "unknown"}, seconds=30)
        await pool.run(import_job(tmp_path, name="three"), seconds=30)
        await eventually("both are replaced", lambda: not used & set(pool.pids))
        # An error of the job itself costs no worker process.
        used = set(pool.pids)
        with pytest.raises(LayerInvalid):
            await pool.run(import_job(tmp_path, b"no blob", name="four"), seconds=30)
        assert used <= set(pool.pids)


@pytest_twisted.ensureDeferred
async def test_an_idle_worker_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.05)
    async with pool_of(1) as pool:
        await pool.run(import_job(tmp_path), seconds=30)
        await eventually("it ends", lambda: pool.pids == [])
        assert (await pool.run(import_job(tmp_path), seconds=30))["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_workers_are_ready_before_there_is_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.05)
    async with pool_of(3, ready=2) as pool:
        assert pool.pids == []
        pool.warm_up()
        first = set(pool.pids)
        assert len(first) == 2
        pool.warm_up()
        assert set(pool.pids) == first
        await pool.run(import_job(tmp_path), seconds=30)
        assert set(pool.pids) == first
        # the worker process that was used is replaced after its idle time, the other stays
        await eventually(
            "it is replaced",
            lambda: len(set(pool.pids) - first) == 1 and len(pool.pids) == 2,
        )
        second = set(pool.pids)
        assert (len(second), len(second & first)) == (2, 1)
        job = ensureDeferred(pool.run(import_job(tmp_path), seconds=30))
        job.cancel()
        with pytest.raises(CancelledError):
            await job
        third = set(pool.pids)
        assert (len(third), len(third & second)) == (2, 1)


@pytest_twisted.ensureDeferred
async def test_no_more_workers_than_slots(tmp_path: Path) -> None:
    async with pool_of(2) as pool:
        jobs = [
            ensureDeferred(pool.run(import_job(tmp_path, name=str(number)), seconds=30))
            for number in range(8)
        ]
        assert len(pool.pids) == 2
        assert [(await job)["size"] for job in jobs] == [len(TAR)] * 8
        assert len(pool.pids) <= 2


@pytest.mark.parametrize("memory", [mib << 20 for mib in (1, 24, 32, 40, 1024)])
@pytest_twisted.ensureDeferred
async def test_too_little_memory_fails_the_job_and_never_hangs(tmp_path: Path, memory: int) -> None:
    """A delta whose index alone needs more memory than there is: whichever allocation fails, there
    is an answer.
    """
    content = hashlib.shake_128(b"seed").digest(24 << 20)
    tar = tar_of(content)
    (tmp_path / "base").write_bytes(tar)
    changed = bytearray(tar)
    for at in range(1024, len(tar) - 1024, 4096):
        changed[at] ^= 1
    (tmp_path / "target").write_bytes(changed)
    files = {
        name: {
            "diff_id": f"sha256:{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}",
            "path": str(tmp_path / name),
            "size": len(tar),
        }
        for name in ("base", "target")
    }
    job: Json = {
        "task": "delta",
        "base": [files["base"]],
        "targets": [files["target"]],
        "out_dir": str(tmp_path),
        "stem": "made",
        "effort": "balanced",
        "form": "gzip",
        "prices": {},
        "threads": 2,
        "index_dir": None,
    }
    async with pool_of(1, memory) as pool:
        try:
            done = await pool.run(job, seconds=40)
        except WorkerFailed as error:
            assert memory < 1 << 30, "it was enough"
            assert "seconds" not in str(error), "it hung"
        else:
            assert memory > 1 << 20, "it cannot have fitted"
            assert len(done["layers"]) == 1


@pytest_twisted.ensureDeferred
async def test_a_worker_that_cannot_be_started_is_a_failure_and_holds_no_slot(
    tmp_path: Path,
) -> None:
    class NoProcesses:
        """The reactor of a machine without free processes."""

        def __getattr__(self, name: str) -> object:
            return getattr(reactor, name)

        def spawnProcess(self, *args: object, **kwargs: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    pool = WorkerPool(cast(IReactor, NoProcesses()), 1)
    for _ in range(3):
        with pytest.raises(WorkerFailed, match="cannot be started"):
            await pool.run(import_job(tmp_path), seconds=30)
    await pool.close()


@pytest_twisted.ensureDeferred
async def test_a_worker_ends_when_its_parent_ends_during_a_job(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        job, fifo = endless_job(tmp_path)
        running: Deferred[Json] = ensureDeferred(pool.run(job, seconds=30))
        end = await until_read(fifo)
        for worker in pool._all:
            worker.transport.closeStdin()  # the kernel does this when a parent dies
        with pytest.raises(WorkerFailed, match="ended before"):
            await running
        os.close(end)


def test_a_worker_starts_no_job_for_a_parent_that_ended(tmp_path: Path) -> None:
    """The worker may have been starting when its server was killed, with a job in its pipe
    already, while another server runs by now.
    """
    worker = [sys.executable, "-m", "obdelta.processes.worker_main", "0", "0"]
    for parent, made in ((os.getpid(), True), (os.getppid(), False)):
        job = import_job(tmp_path, name=f"of{parent}") | {"parent": parent}
        with subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
            assert running.stdin is not None
            assert running.stdout is not None
            running.stdin.write(json.dumps(job).encode() + b"\n")
            running.stdin.flush()
            assert any(b'"result"' in line for line in iter(running.stdout.readline, b"")) == made
        assert Path(job["out"]).exists() == made


def test_a_long_answer_is_joined_once() -> None:
    """A worker process's report about hundreds of layers arrives in a thousand pieces."""
    worker = pool_module._Worker(lambda _: None)
    reports: list[Json] = []
    worker._progress = reports.append
    line = json.dumps({"progress": {"long": "x" * (1 << 20)}}).encode() + b"\n"
    copied = [0]
    for at in range(0, len(line), 4096):
        worker.outReceived(CountedBytes.of(line[at : at + 4096], copied))
    assert reports == [{"long": "x" * (1 << 20)}]
    assert copied[0] <= len(line)
