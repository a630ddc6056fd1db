"""Content-addressed files: a file named by a digest has these bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, gatherResults

from obdelta.concurrency.tasks import Threads, shielded
from obdelta.errors import DigestMismatch, SizeMismatch
from obdelta.oci import Digest
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from tests.support.store import threads

__all__ = ["threads"]

CONTENT = os.urandom(100_000)
DIGEST = Digest.of(CONTENT)


@pytest.fixture
def blobs(tmp_path: Path, threads: Threads) -> BlobStore:
    return BlobStore(tmp_path / "state", threads)


def a_temporary(blobs: BlobStore, content: bytes) -> Path:
    path = blobs.temporary(".part")
    path.write_bytes(content)
    return path


@pytest_twisted.ensureDeferred
async def test_put_and_adopt_give_the_name_that_is_documented(
    blobs: BlobStore, tmp_path: Path
) -> None:
    assert blobs.path(DIGEST) is None
    assert blobs.size(DIGEST) is None
    assert await blobs.put(CONTENT) == DIGEST
    path = blobs.path(DIGEST)
    assert path == tmp_path / "state" / "blobs" / "sha256" / DIGEST.hex[:2] / DIGEST.hex
    assert path.read_bytes() == CONTENT
    assert blobs.size(DIGEST) == len(CONTENT)
    other = b"other"
    tmp = a_temporary(blobs, other)
    path = await blobs.adopt(tmp, Digest.of(other), len(other), verify=True)
    assert path == blobs.path(Digest.of(other))
    assert path.read_bytes() == other
    assert not list(blobs.tmp.iterdir())
    assert set(blobs.digests()) == {DIGEST, Digest.of(other)}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest_twisted.ensureDeferred
async def test_many_adopt_the_same_digest_at_once(blobs: BlobStore) -> None:
    temporaries = [a_temporary(blobs, CONTENT) for _ in range(30)]
    paths = await gatherResults(
        [ensureDeferred(blobs.adopt(tmp, DIGEST, len(CONTENT))) for tmp in temporaries],
        consumeErrors=True,
    )
    assert set(paths) == {blobs.path(DIGEST)}
    assert paths[0].read_bytes() == CONTENT
    assert not list(blobs.tmp.iterdir())


@pytest_twisted.ensureDeferred
async def test_wrong_bytes_never_get_the_name(blobs: BlobStore) -> None:
    tmp = a_temporary(blobs, CONTENT[:-1])
    with pytest.raises(SizeMismatch) as size:
        await blobs.adopt(tmp, DIGEST, len(CONTENT))
    assert (size.value.expected, size.value.actual) == (len(CONTENT), len(CONTENT) - 1)
    tmp = a_temporary(blobs, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    with pytest.raises(DigestMismatch) as digest:
        await blobs.adopt(tmp, DIGEST, len(CONTENT), verify=True)
    assert digest.value.expected == DIGEST
    assert blobs.path(DIGEST) is None
    assert not list(blobs.tmp.iterdir())
    with pytest.raises(FileNotFoundError):
        await blobs.adopt(blobs.temporary(), DIGEST, len(CONTENT))


@pytest_twisted.ensureDeferred
async def test_a_file_that_was_cut_short_is_replaced(blobs: BlobStore) -> None:
    await blobs.put(CONTENT)
    path = blobs.path(DIGEST)
    assert path is not None
    os.truncate(path, 10)
    await blobs.put(CONTENT)
    assert path.read_bytes() == CONTENT


@pytest_twisted.ensureDeferred
async def test_pinned_blobs_stay_and_open_files_stay_readable(blobs: BlobStore) -> None:
    await blobs.put(CONTENT)
    path = blobs.path(DIGEST)
    assert path is not None
    first, second = blobs.pin(DIGEST), blobs.pin(DIGEST)
    assert not await blobs.remove(DIGEST)
    first.release()
    first.release()
    assert not await blobs.remove(DIGEST)
    with second, path.open("rb") as file:
        second.release()
        assert await blobs.remove(DIGEST)
        assert blobs.path(DIGEST) is None
        assert file.read() == CONTENT
    assert await blobs.remove(DIGEST)


@pytest_twisted.ensureDeferred
async def test_the_sweep_removes_only_our_names_from_tmp(blobs: BlobStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("stays")
    await blobs.put(CONTENT)
    blobs.temporary(".spool").write_bytes(b"x")
    blobs.temporary(".blob").symlink_to(outside)
    blobs.temporary("-0.delta").symlink_to("nowhere")
    deep = blobs.temporary(".tree")
    deep.mkdir()
    foreign = [
        "file",
        "a" * 23,
        "a" * 25,
        "A" * 24,
        "a" * 24 + "~",
        "a" * 24 + " copy",
        "vmware-root_1",
        ".X11-unix",
    ]
    for name in foreign:
        (blobs.tmp / name).mkdir()
        (blobs.tmp / name / "precious").write_text("stays")
    (deep / "link").symlink_to(outside)
    locked = deep / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "inner" / "file").write_bytes(b"x")
    locked.chmod(0)
    os.mkfifo(deep / "pipe")
    # Deeper than the longest path, and than Python's recursion.
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deeper", dir_fd=here)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert await blobs.sweep() == 4
    assert sorted(path.name for path in blobs.tmp.iterdir()) == sorted(foreign)
    assert all((blobs.tmp / name / "precious").read_text() == "stays" for name in foreign)
    assert (outside / "precious").read_text() == "stays"
    assert blobs.path(DIGEST) is not None
    assert await blobs.sweep() == 0


@pytest_twisted.ensureDeferred
async def test_writable_says_whether_a_file_can_be_written(blobs: BlobStore) -> None:
    assert await blobs.writable()
    assert not list(blobs.tmp.iterdir())
    # Removed by another program: it is rebuilt.
    blobs.tmp.rmdir()
    assert await blobs.writable()
    blobs.tmp.rmdir()
    blobs.tmp.touch()
    assert not await blobs.writable()


@pytest_twisted.ensureDeferred
async def test_cancelling_ends_the_wait_but_not_the_work(blobs: BlobStore) -> None:
    wait = ensureDeferred(blobs.put(CONTENT))
    wait.cancel()
    with pytest.raises(CancelledError):
        await wait
    # The threads run in any order, but the same digest is adopted by both, and both leave nothing
    # behind.
    await blobs.put(CONTENT)
    path = blobs.path(DIGEST)
    assert path is not None
    assert path.read_bytes() == CONTENT


def test_a_shield_keeps_the_callbacks_of_the_work() -> None:
    work: Deferred[int] = Deferred()
    seen: list[int] = []
    work.addCallback(seen.append)
    wait = shielded(work)
    failed: list[object] = []
    wait.addErrback(failed.append)
    wait.cancel()
    assert len(failed) == 1
    work.callback(7)
    assert seen == [7]


def test_disk_bytes_counts_links_once_and_whole_blocks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("a")
    alone = files.disk_bytes(tmp_path / "c")
    directory = files.disk_bytes(tmp_path) - 8192 - alone
    assert alone == 4096
    assert directory > 0
    assert files.disk_bytes(tmp_path / "gone") == 0
