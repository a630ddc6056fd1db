"""Jobs for worker processes, and a pool that runs them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from obdelta.processes.worker_main import Json
from obdelta.processes.worker_pool import WorkerPool
from tests.support.waiting import eventually
from tests.support.web import reactor


@asynccontextmanager
async def pool_of(size: int, memory: int = 0, ready: int = 0) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(reactor, size, memory, ready=ready)
    try:
        yield pool
    finally:
        await pool.close()
        assert pool.pids == []


def tar_of(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


TAR = tar_of(b"content" * 1000)


def import_job(
    directory: Path, blob: bytes | None = None, *, name: str = "job", limit: int = 1 << 30
) -> Json:
    """Returns a job that inflates one small layer."""
    source = directory / f"{name}.blob"
    source.write_bytes(gzip.compress(TAR, mtime=0) if blob is None else blob)
    return {
        "task": "import",
        "source": str(source),
        "out": str(directory / f"{name}.tar"),
        "limit": limit,
        "diff_id": f"sha256:{hashlib.sha256(TAR).hexdigest()}",
    }


def endless_job(directory: Path, name: str = "endless") -> tuple[Json, Path]:
    """Returns an import of a FIFO, which runs until a process writes to the FIFO, and the FIFO."""
    fifo = directory / f"{name}.fifo"
    os.mkfifo(fifo)
    job = import_job(directory, name=name)
    return {**job, "source": str(fifo)}, fifo


async def until_read(fifo: Path) -> int:
    """Waits until the worker process has opened the FIFO; returns the writing end, which keeps it
    waiting for bytes.
    """

    def opened() -> list[int]:
        try:
            return [os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)]
        except OSError:
            return []  # no reader yet

    (end,) = await eventually("the worker process reads", opened)
    return end
