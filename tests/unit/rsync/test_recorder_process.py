"""The child process that makes streams, run by the reactor: real processes, and a clock that the
test moves.
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import ensureDeferred

from obdelta.errors import ProofFailed, StoreFull, WorkerFailed
from obdelta.oci import Digest
from obdelta.rootfs.compare import differences
from obdelta.rsync import batch
from obdelta.rsync.recorder_process import RecordedStream, RecordingJob, RsyncRun
from obdelta.rsync.size_estimate import Forecast, RemainingWork
from tests.support import rootfs
from tests.support.recorded_pair import Pair, install, pair, reactor, rsync_instead, until

__all__ = ["pair", "rsync_instead"]


@pytest_twisted.ensureDeferred
async def test_a_stream_is_made_and_proven(pair: Pair) -> None:
    sizes: list[int] = []
    rests: list[int | None] = []
    reports: list[RecordedStream] = []

    def grew(size: int, rest: int | None) -> None:
        sizes.append(size)
        rests.append(rest)

    run = RsyncRun(reactor)
    recorded = await run.run(pair.order(), grew=grew, recorded=reports.append)
    stream = (pair.directory / "stream").read_bytes()
    assert reports == [recorded]
    assert recorded[:2] == (len(stream), Digest.of(stream))
    assert sizes == sorted(sizes) and sizes[-1] == len(stream)
    assert set(rests[:-1]) == {None} and rests[-1] == 0
    metadata, _, body = stream.partition(b"\0")
    assert json.loads(metadata) == {"version": 2, "dockerConfig": {"Cmd": ["x"]}}
    assert batch.Header.decode(body)[0] == batch.EXPECTED
    await until(lambda: not (pair.directory / "scratch").exists())


@pytest_twisted.ensureDeferred
async def test_the_same_pair_gives_the_same_bytes(pair: Pair) -> None:
    """Two recorders run at once, while their proofs link the same base."""
    run = RsyncRun(reactor)
    orders = [
        pair.order(out=pair.directory / name, scratch=pair.directory / f"{name}-scratch")
        for name in ("one", "two")
    ]
    running = [ensureDeferred(run.run(order)) for order in orders]
    recorded = [(await deferred).digest for deferred in running]
    assert recorded[0] == recorded[1]
    fresh = Pair(pair.directory / "fresh-trees")
    assert list(differences(pair.base, fresh.base)) == []
    assert list(differences(pair.target, fresh.target)) == []


@pytest_twisted.ensureDeferred
async def test_a_forecast_is_made(tmp_path: Path) -> None:
    """The forecast is never less than the remaining bytes, and exact at the end; the batch is the
    same as without it.
    """
    chance = random.Random(1)
    kept = [rootfs.file(f"kept{number}", chance.randbytes(200_000)) for number in range(5)]
    files = {f"new{number:02}": chance.randbytes(50_000).hex().encode() for number in range(40)}
    linked = [
        rootfs.hardlink("zlink", "new00"),
        rootfs.symlink("symlink", "kept0"),
        rootfs.fifo("fifo"),
    ]
    new = [rootfs.file(name, content) for name, content in files.items()]
    base = rootfs.tree(rootfs.image([kept], tmp_path / "1"), tmp_path / "base")
    target = rootfs.tree(rootfs.image([kept, [*new, *linked]], tmp_path / "2"), tmp_path / "target")
    order = RecordingJob(base, target, None, tmp_path / "stream", tmp_path / "scratch", True)
    reports: list[tuple[int, int | None]] = []
    recorded = await RsyncRun(reactor).run(
        order, grew=lambda size, rest: reports.append((size, rest))
    )
    bounds = [size + rest for size, rest in reports if rest is not None]
    assert all(
        recorded.size <= bound <= 2_400_000 + 40 * 100_000 * 65 // 64 + 45 * 64 + 20_000
        for bound in bounds
    )
    assert reports[-1] == (recorded.size, 0)
    other = order._replace(
        out=tmp_path / "plain", scratch=tmp_path / "other-scratch", forecast=False
    )
    plain = await RsyncRun(reactor).run(other)
    assert plain.digest == recorded.digest


def test_a_forecast_counts_the_bytes_of_the_batch(tmp_path: Path) -> None:
    base = [
        rootfs.file("same/a", b"1" * 1000),
        rootfs.file("content", b"1" * 500),
        rootfs.file("size", b"1" * 400),
        rootfs.directory("was-directory"),
        rootfs.file("was-file", b"1"),
    ]
    target = [
        rootfs.file("same/a", b"1" * 1000, mtime=5),
        rootfs.file("content", b"2" * 500),
        rootfs.file("size", b"1" * 401),
        rootfs.file("was-directory", b"1" * 30),
        rootfs.file("was-file/below", b"1" * 7),
        rootfs.file("new/below", b"1" * 60_000),
        rootfs.hardlink("new/link", "new/below"),
    ]
    trees = [
        rootfs.tree(rootfs.image([entries], tmp_path / name), tmp_path / f"{name}-tree")
        for name, entries in (("base", base), ("target", target))
    ]
    forecast = Forecast(*trees)
    forecast.done()
    assert forecast.remaining() == (500 + 401 + 30 + 7 + 60_000, 5)
    forecast.sent(60_000)
    assert forecast.remaining() == (500 + 401 + 30 + 7, 4)


@pytest.mark.parametrize("size", [0, 100, 1_000_000])
def test_a_forecast_is_an_upper_bound(size: int) -> None:
    assert size < RemainingWork(size, 3).rest < size + size // 60 + 17_000


@pytest_twisted.ensureDeferred
async def test_errors_have_the_words_of_rsync_without_our_paths(
    pair: Pair, rsync_instead: Path
) -> None:
    install(rsync_instead, f'echo "rsync: {pair.target}/x: {pair.base}/y failed" >&2; exit 12')
    with pytest.raises(WorkerFailed) as failed:
        await RsyncRun(reactor).run(pair.order())
    assert "status 12" in str(failed.value) and "target/x: base/y failed" in str(failed.value)
    assert str(pair.directory) not in str(failed.value)


@pytest_twisted.ensureDeferred
async def test_long_output_is_not_kept(pair: Pair, rsync_instead: Path) -> None:
    install(rsync_instead, "seq 1 300000 >&2; exit 3")
    with pytest.raises(WorkerFailed) as failed:
        await RsyncRun(reactor).run(pair.order())
    assert "299999 300000" in str(failed.value) and len(str(failed.value)) < 2500


@pytest_twisted.ensureDeferred
async def test_a_missing_rsync_is_a_clear_error(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkerFailed, match="no rsync"):
        await RsyncRun(reactor).run(pair.order())


@pytest_twisted.ensureDeferred
async def test_a_batch_to_another_target_is_refused(pair: Pair, rsync_instead: Path) -> None:
    """rsync applies nothing and reports success, as 3.1 does with batches of protocol 32."""
    install(
        rsync_instead, 'case "$*" in *--read-batch*) exit 0;; *) exec /usr/bin/rsync "$@";; esac'
    )
    with pytest.raises(ProofFailed) as failed:
        await RsyncRun(reactor).run(pair.order())
    assert "missing" in str(failed.value) and "extra" in str(failed.value)


@pytest_twisted.ensureDeferred
async def test_a_batch_that_cannot_be_applied_is_refused(pair: Pair, rsync_instead: Path) -> None:
    install(
        rsync_instead,
        'case "$*" in *--read-batch*) echo no >&2; exit 23;; *) exec /usr/bin/rsync "$@";; esac',
    )
    with pytest.raises(ProofFailed, match="status 23"):
        await RsyncRun(reactor).run(pair.order())


@pytest_twisted.ensureDeferred
async def test_a_full_disk_is_a_clear_error(pair: Pair) -> None:
    mount = pair.directory / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", mount], check=True)
    try:
        with pytest.raises(StoreFull):
            await RsyncRun(reactor).run(pair.order(out=mount / "stream"))
    finally:
        subprocess.run(["umount", mount], check=True)
