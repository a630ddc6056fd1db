"""Files that are read while this or another process writes them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from obdelta.concurrency.tasks import Threads
from obdelta.errors import Cancelled, Missing, SizeMismatch
from obdelta.store.blobs import BlobStore
from obdelta.store.file_writer import ExternalFile
from tests.support.store import blob_writer
from tests.support.web import reactor
from tests.support.written_files import CONTENT, DIGEST, blobs, threads, write_all

__all__ = ["blobs", "threads"]


@pytest_twisted.ensureDeferred
async def test_sizes_are_kept(blobs: BlobStore) -> None:
    over = blob_writer(blobs, length=3)
    with pytest.raises(SizeMismatch) as much:
        await over.write(b"1234")
    assert (much.value.expected, much.value.actual) == (3, 4)
    short = blob_writer(blobs, length=3)
    await short.write(b"12")
    with pytest.raises(SizeMismatch) as few:
        await short.finish()
    assert (few.value.expected, few.value.actual) == (3, 2)
    other = blob_writer(blobs)
    await other.write(b"12")
    with pytest.raises(SizeMismatch):
        await other.finish(expected_size=1)
    assert not list(blobs.tmp.iterdir())
    beyond = blob_writer(blobs)
    deliveries = [beyond.deliver(StringTransport(), 3), beyond.deliver(StringTransport(), 0, 3)]
    await beyond.write(b"12")
    await beyond.finish()
    for delivery in deliveries:
        with pytest.raises(SizeMismatch):
            await delivery
    with pytest.raises(ValueError, match="backwards"):
        beyond.deliver(StringTransport(), 2, 1)


@pytest_twisted.ensureDeferred
async def test_an_aborted_writer_leaves_nothing(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs)
    delivery = written_file.deliver(StringTransport())
    write = ensureDeferred(written_file.write(CONTENT))
    with pytest.raises(RuntimeError, match="one call at a time"):
        await written_file.write(b"more")
    write.cancel()
    with pytest.raises(CancelledError):
        await write
    await written_file.abort(Missing("the image is gone"))
    with pytest.raises(Missing, match="image is gone"):
        await delivery
    await written_file.abort()
    assert not list(blobs.tmp.iterdir())
    finished = blob_writer(blobs)
    await finished.write(CONTENT)
    await finished.finish(DIGEST)
    await finished.abort()
    assert finished.complete
    assert blobs.path(DIGEST) is not None


@pytest_twisted.ensureDeferred
async def test_a_finished_writer_serves_until_its_file_is_gone(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs)
    await write_all(written_file, CONTENT)
    await written_file.finish()
    for _ in range(2):
        consumer = StringTransport()
        await written_file.deliver(consumer, 10, 20)
        assert consumer.value() == CONTENT[10:20]
    await blobs.remove(DIGEST)
    consumer = StringTransport()
    with pytest.raises(Missing):
        await written_file.deliver(consumer)
    assert consumer.producer is None


@pytest_twisted.ensureDeferred
async def test_a_failing_consumer_does_not_affect_the_others(blobs: BlobStore) -> None:
    class Broken(StringTransport):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def write(self, data: bytes) -> None:
            raise ZeroDivisionError

    written_file = blob_writer(blobs)
    good = StringTransport()
    deliveries = [written_file.deliver(Broken()), written_file.deliver(good)]
    await written_file.write(CONTENT)
    await written_file.finish()
    with pytest.raises(ZeroDivisionError):
        await deliveries[0]
    await deliveries[1]
    assert good.value() == CONTENT


@pytest_twisted.ensureDeferred
async def test_a_file_truncated_while_it_is_read_is_an_error(
    tmp_path: Path, threads: Threads
) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"x" * 10)
    followed = ExternalFile(path, threads)
    followed.grew(10)
    path.write_bytes(b"")
    with pytest.raises(SizeMismatch):
        await followed.deliver(StringTransport(), 0, 5)


class _Writer(ProcessProtocol):
    """Reports the bytes that the child says it wrote."""

    def __init__(self, followed: ExternalFile) -> None:
        self.followed = followed
        self.ended: Deferred[None] = Deferred()

    def outReceived(self, data: bytes) -> None:
        for line in data.split():
            self.followed.grew(max(self.followed.size, int(line)))

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback(None)


_WRITER = """
import os, sys
content = open(sys.argv[1], "rb").read()
with open(sys.argv[2], "wb", buffering=0) as out:
    for start in range(0, len(content), 123457):
        out.write(content[start : start + 123457])
        os.write(1, b"%d\\n" % out.tell())
"""


@pytest_twisted.ensureDeferred
async def test_a_file_of_another_process_is_followed(tmp_path: Path, threads: Threads) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    path = tmp_path / "batch"
    followed = ExternalFile(path, threads, unverified_tail=1000)
    with pytest.raises(Missing):
        followed.grew(0)
    consumers = [StringTransport() for _ in range(5)]
    deliveries = [
        followed.deliver(consumer, 1000 * index) for index, consumer in enumerate(consumers)
    ]
    writer = _Writer(followed)
    reactor.spawnProcess(
        writer, sys.executable, [sys.executable, "-c", _WRITER, str(tmp_path / "source"), str(path)]
    )
    await followed.reached(1_000_000)
    consumers.append(StringTransport())
    deliveries.append(followed.deliver(consumers[-1], 5000))
    await writer.ended
    assert followed.size == len(CONTENT)
    assert followed.available == len(CONTENT) - 1000
    final = tmp_path / "final"
    path.rename(final)
    followed.finished(final)
    for index, (delivery, consumer) in enumerate(zip(deliveries, consumers, strict=True)):
        await delivery
        assert (
            hashlib.sha256(consumer.value()).digest()
            == hashlib.sha256(CONTENT[1000 * index :]).digest()
        )
    with pytest.raises(RuntimeError, match="ended already"):
        followed.grew(1)


@pytest_twisted.ensureDeferred
async def test_a_failure_of_a_followed_file_reaches_all_readers(
    tmp_path: Path, threads: Threads
) -> None:
    path = tmp_path / "batch"
    path.write_bytes(CONTENT)
    died = ExternalFile(path, threads)
    died.grew(5)
    with pytest.raises(ValueError, match="shrink"):
        died.grew(4)
    delivery = died.deliver(StringTransport())
    died.failed(Cancelled("rsync died"))
    with pytest.raises(Cancelled, match="rsync died"):
        await delivery
    died.failed(Cancelled("once more"))
    with pytest.raises(Cancelled, match="rsync died"):
        await died.done()
    whole = ExternalFile(path, threads)
    whole.finished()
    whole.failed(Cancelled("too late"))
    consumer = StringTransport()
    await whole.deliver(consumer)
    assert consumer.value() == CONTENT
    short = ExternalFile(path, threads, length=len(CONTENT) + 1)
    delivery = short.deliver(StringTransport())
    short.finished()
    with pytest.raises(SizeMismatch):
        await delivery
    assert path.exists()
