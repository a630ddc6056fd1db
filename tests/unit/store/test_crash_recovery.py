"""After a crash of the operating system, the files written last are verified. After a crash of the
process this is not necessary.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from obdelta.concurrency.tasks import Threads
from obdelta.oci import Digest
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import UpstreamBlobCache
from obdelta.store.crash_recovery import MARGIN, REFRESH, RunMarker, VerificationResult, boot_id
from tests.support.store import threads

__all__ = ["threads"]

BLOBS = {Digest.of(b"good" * 100), Digest.of(b"bad" * 100)}


def known(blobs: set[Digest]) -> Callable[[], Awaitable[set[Digest]]]:
    """Returns a function that reads these blobs from a catalogue."""

    async def read() -> set[Digest]:
        return blobs

    return read


def spoil(path: Path) -> None:
    """Replaces the content by zeros of the same length."""
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))


async def a_state(state: Path, threads: Threads) -> dict[str, Path]:
    """Returns the paths of one intact and one corrupt file of each kind."""
    blobs = BlobStore(state, threads)
    paths = {}
    for name in ("good", "bad"):
        content = name.encode() * 100
        digest = await blobs.put(content)
        path = blobs.path(digest)
        assert path is not None
        paths[f"{name} blob"] = path
        for folder, suffix in (("layers", ".tar"), ("upstream", ".blob")):
            (state / folder).mkdir(exist_ok=True)
            paths[f"{name} {folder}"] = state / folder / (digest.hex + suffix)
            paths[f"{name} {folder}"].write_bytes(content)
    paths["index"] = state / "layers" / (Digest.of(b"good" * 100).hex + ".idx")
    paths["index"].write_bytes(b"index")
    tree = state / "trees" / Digest.of(b"tree").hex
    (tree / "root").mkdir(parents=True)
    (tree / "root" / "file").write_bytes(b"file")
    paths["tree"] = tree
    for name in ("bad blob", "bad layers", "bad upstream"):
        spoil(paths[name])
    return paths


@pytest_twisted.ensureDeferred
async def test_after_a_crash_of_the_system_corrupt_files_are_removed(
    tmp_path: Path, threads: Threads
) -> None:
    paths = await a_state(tmp_path, threads)
    (tmp_path / "running-1").write_bytes(b"another boot\n")
    running = RunMarker(tmp_path, threads, Clock())
    assert await running.begin(known(BLOBS)) == VerificationResult(6, 5)
    there = {name for name, path in paths.items() if path.exists()}
    assert there == {"good blob", "good layers", "good upstream"}
    assert [path.read_bytes() for path in tmp_path.glob("running-*")] == [boot_id()]
    await running.end()
    assert list(tmp_path.glob("running-*")) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_a_crash_of_the_system_loses_no_blob_that_the_catalogue_lacks(
    tmp_path: Path, threads: Threads
) -> None:
    paths = await a_state(tmp_path, threads)
    (tmp_path / "running-1").write_bytes(b"another boot\n")
    running = RunMarker(tmp_path, threads, Clock())
    unknown = {Digest.of(b"bad" * 100)}
    assert await running.begin(known(BLOBS - unknown)) == VerificationResult(5, 4)
    assert paths["bad blob"].exists()
    await running.end()


@pytest_twisted.ensureDeferred
async def test_files_written_long_before_a_crash_are_not_verified(
    tmp_path: Path, threads: Threads
) -> None:
    paths = await a_state(tmp_path, threads)
    marker = tmp_path / "running-1"
    marker.write_bytes(b"another boot\n")
    later = paths["tree"].stat().st_ctime + MARGIN + 10
    os.utime(marker, (later, later))
    running = RunMarker(tmp_path, threads, Clock())
    assert await running.begin(known(BLOBS)) == VerificationResult(0, 0)
    assert all(path.exists() for path in paths.values())
    await running.end()


@pytest_twisted.ensureDeferred
async def test_after_a_process_that_died_nothing_is_verified_and_the_catalogue_is_not_read(
    tmp_path: Path, threads: Threads
) -> None:
    paths = await a_state(tmp_path, threads)

    async def unexpected() -> frozenset[Digest]:
        raise AssertionError("the catalogue's blobs are needed after a crash only")

    dead = tmp_path / f"running-{2**22 + 1}"  # above the largest process ID of Linux
    dead.write_bytes(boot_id())
    running = RunMarker(tmp_path, threads, Clock())
    assert await running.begin(unexpected) == VerificationResult(0, 0)
    assert all(path.exists() for path in paths.values())
    assert not dead.exists()
    await running.end()


@pytest_twisted.ensureDeferred
async def test_the_marker_is_refreshed(tmp_path: Path, threads: Threads) -> None:
    clock = Clock()
    BlobStore(tmp_path, threads)
    running = RunMarker(tmp_path, threads, clock)
    await running.begin(known(BLOBS))
    (marker,) = tmp_path.glob("running-*")
    os.utime(marker, (1000, 1000))
    clock.advance(REFRESH)
    assert marker.stat().st_mtime > 1000
    await running.end()
    assert not clock.getDelayedCalls()


@pytest_twisted.ensureDeferred
async def test_upstream_blobs_are_synced_once_at_an_orderly_end(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync_file = files.sync_file

    def noting(path: Path) -> int:
        size = sync_file(path)
        synced.append(path.read_text())
        return size

    monkeypatch.setattr(files, "sync_file", noting)
    cache = await UpstreamBlobCache.open(tmp_path, threads)
    for content in (b"kept", b"gone"):
        tmp = cache.temporary(".blob")
        tmp.write_bytes(content)
        path = cache.place(tmp, Digest.of(content), len(content))
        cache.keep(Digest.of(content), len(content))
    path.unlink()
    assert synced == []
    await cache.sync()
    await cache.sync()
    assert synced == ["kept"]
