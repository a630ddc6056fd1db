"""The pool with real worker processes: jobs that are done, refused, killed, late or cancelled."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import os
import signal
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, ensureDeferred

from obdelta import errors
from obdelta.errors import (
    Cancelled,
    LayerInvalid,
    ObdeltaError,
    StoreFailed,
    StoreFull,
    WorkerFailed,
)
from obdelta.processes.worker_main import error_as_json, error_from_json
from tests.support.worker_jobs import TAR, endless_job, import_job, pool_of, tar_of, until_read


@pytest_twisted.ensureDeferred
async def test_a_missing_file_is_reported_without_its_path(tmp_path: Path) -> None:
    job = import_job(tmp_path)
    Path(job["source"]).unlink()
    async with pool_of(1) as pool:
        with pytest.raises(StoreFailed) as failure:
            await pool.run(job, seconds=30)
    assert str(failure.value) == "store: No such file or directory"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest_twisted.ensureDeferred
async def test_a_worker_does_several_jobs(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        first = await pool.run(import_job(tmp_path), seconds=30)
        pids = pool.pids
        second = await pool.run(import_job(tmp_path), seconds=30)
        assert first == second
        assert first["size"] == len(TAR)
        assert (tmp_path / "job.tar").read_bytes() == TAR
        assert pool.pids == pids


def errors_with_fields() -> list[ObdeltaError]:
    """Returns one of each class of errors whose constructor has parameters of its own."""
    found = []
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, ObdeltaError) and name[0] != "_":
            fields = inspect.signature(error.__init__, eval_str=True).parameters.copy()
            fields.pop("self")
            if not fields.keys() & {"args", "errors"}:
                values = {
                    each.name: 7 if each.annotation is int else "7" for each in fields.values()
                }
                found.append(error(**values))
    return found


@pytest.mark.parametrize("error", errors_with_fields(), ids=lambda error: type(error).__name__)
def test_an_error_with_fields_crosses_whole(error: ObdeltaError) -> None:
    crossed = error_from_json(error_as_json(error), {type(error).__name__: type(error)})
    assert (type(crossed), str(crossed)) == (type(error), str(error))


@pytest_twisted.ensureDeferred
async def test_an_error_of_a_job_keeps_its_class(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        with pytest.raises(LayerInvalid, match="truncated"):
            await pool.run(import_job(tmp_path, gzip.compress(TAR, mtime=0)[:-9]), seconds=30)
        with pytest.raises(LayerInvalid, match="more than 1000 bytes"):
            await pool.run(import_job(tmp_path, limit=1000), seconds=30)
        with pytest.raises(LayerInvalid, match="inflates to") as failure:
            await pool.run(import_job(tmp_path, gzip.compress(tar_of(b"other"))), seconds=30)
        assert hashlib.sha256(TAR).hexdigest() in str(failure.value)
        with pytest.raises(WorkerFailed, match="KeyError"):
            await pool.run({"task": "unknown"}, seconds=30)
        # Through a link: a failed import removes its output, which must not be the device itself.
        (tmp_path / "full").symlink_to("/dev/full")
        with pytest.raises(StoreFull):
            await pool.run({**import_job(tmp_path), "out": str(tmp_path / "full")}, seconds=30)
        assert Path("/dev/full").is_char_device()
        assert len(pool.pids) == 1
        assert (await pool.run(import_job(tmp_path), seconds=30))["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_a_killed_worker_fails_its_own_job_only(tmp_path: Path) -> None:
    async with pool_of(2) as pool:
        job, fifo = endless_job(tmp_path)
        doomed = ensureDeferred(pool.run(job, seconds=30))
        end = await until_read(fifo)
        (pid,) = pool.pids
        other = ensureDeferred(pool.run(import_job(tmp_path), seconds=30))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="signal 9"):
            await doomed
        os.close(end)
        assert (await other)["size"] == len(TAR)
        assert (await pool.run(import_job(tmp_path), seconds=30))["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_an_idle_worker_that_died_unnoticed_gets_no_job(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        await pool.run(import_job(tmp_path, name="one"), seconds=30)
        (idle,) = pool.pids
        os.kill(idle, signal.SIGKILL)
        # Dead, and not reaped: the reactor has had no turn in which to notice.
        os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
        assert pool.pids == [idle]
        result = await pool.run(import_job(tmp_path, name="two"), seconds=30)
        assert result["size"] == len(TAR)
        assert idle not in pool.pids


@pytest_twisted.ensureDeferred
async def test_a_job_that_takes_too_long_kills_its_worker(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        job, fifo = endless_job(tmp_path)
        late = ensureDeferred(pool.run(job, seconds=1))
        end = await until_read(fifo)
        (pid,) = pool.pids
        with pytest.raises(WorkerFailed, match="more than 1 seconds"):
            await late
        os.close(end)
        assert not alive(pid)
        assert (await pool.run(import_job(tmp_path), seconds=30))["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_cancelling_kills_the_worker_and_the_next_job_gets_another(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        for number in range(5):
            job, fifo = endless_job(tmp_path, f"endless-{number}")
            running = ensureDeferred(pool.run(job, seconds=30))
            end = await until_read(fifo)
            (pid,) = pool.pids
            waiting = ensureDeferred(pool.run(import_job(tmp_path), seconds=30))
            running.cancel()
            with pytest.raises(CancelledError):
                await running
            # Only now: its output may be removed.
            assert not alive(pid)
            os.close(end)
            assert (await waiting)["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_cancelling_a_wait_for_a_worker_leaves_the_workers_alone(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        job, fifo = endless_job(tmp_path)
        running = ensureDeferred(pool.run(job, seconds=30))
        end = await until_read(fifo)
        queued = ensureDeferred(pool.run(import_job(tmp_path), seconds=30))
        queued.cancel()
        with pytest.raises(CancelledError):
            await queued
        os.write(end, gzip.compress(TAR, mtime=0))
        os.close(end)
        assert (await running)["size"] == len(TAR)
        assert (await pool.run(import_job(tmp_path), seconds=30))["size"] == len(TAR)


@pytest_twisted.ensureDeferred
async def test_closing_ends_jobs_and_refuses_more(tmp_path: Path) -> None:
    async with pool_of(1) as pool:
        job, fifo = endless_job(tmp_path)
        running, queued = (
            ensureDeferred(pool.run(one, seconds=30)) for one in (job, import_job(tmp_path))
        )
        end = await until_read(fifo)
        await pool.close()
        os.close(end)
        for one in (running, queued):
            with pytest.raises(Cancelled):
                await one
        with pytest.raises(Cancelled):
            await pool.run(import_job(tmp_path), seconds=30)
