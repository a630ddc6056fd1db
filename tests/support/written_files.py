"""Files that are written while they are read: their content, and threads that read them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdelta.concurrency.tasks import Threads
from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.file_writer import FileWriter
from tests.support.store import real_threads

CONTENT = random.Random(1).randbytes(3_000_000)
DIGEST = Digest.of(CONTENT)


@pytest.fixture(params=["at once", "in threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    """Yields threads with both ways of reading, whatever the file system supports."""
    if request.param == "in threads":
        monkeypatch.delattr(os, "RWF_NOWAIT")
    with real_threads() as pool:
        yield pool


@pytest.fixture
def blobs(tmp_path: Path, threads: Threads) -> BlobStore:
    return BlobStore(tmp_path / "state", threads)


async def write_all(written_file: FileWriter, content: bytes, chunk: int = 50_000) -> None:
    for start in range(0, len(content), chunk):
        await written_file.write(content[start : start + chunk])
