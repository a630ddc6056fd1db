"""Growing files with real threads, real connections, and a real process that writes."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IPullProducer, IPushProducer, ITCPTransport
from twisted.internet.protocol import ProcessProtocol, Protocol, connectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface.verify import verifyObject

from obdelta.concurrency.threads import Threads
from obdelta.errors import Cancelled, DigestMismatch, Missing, SizeMismatch
from obdelta.oci import Digest
from obdelta.store.blobs import BlobStore
from obdelta.store.file_writer import ExternalFile, FileWriter
from obdelta.store.growing_file import CHUNK, GrowingFile
from tests.support.store import blob_writer, real_threads
from tests.support.web import reactor, serving

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


@pytest_twisted.ensureDeferred
async def test_the_writer_hashes_its_bytes(blobs: BlobStore, threads: Threads) -> None:
    """The writer uses the given digest, and requires it."""
    written_file = FileWriter(blobs.temporary(".spool"), threads, blobs.place, hashed=True)
    await write_all(written_file, CONTENT)
    with pytest.raises(RuntimeError, match="needs the digest"):
        await written_file.finish()
    written_file = FileWriter(blobs.temporary(".spool"), threads, blobs.place, hashed=True)
    await write_all(written_file, CONTENT)
    assert await written_file.finish(DIGEST) == DIGEST
    path = blobs.path(DIGEST)
    assert path is not None
    assert path.read_bytes() == CONTENT


class Download(Protocol):
    """A raw HTTP client: it keeps the body, may stall, and ends with the connection's reason."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.received = bytearray()
        self.ended: Deferred[type[BaseException]] = Deferred()
        self.first: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self._transport.write(
            f"GET {self.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )

    @property
    def _transport(self) -> Any:
        return self.transport

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if not self.first.called:
            self.first.callback(None)

    def stall(self) -> None:
        self._transport.pauseProducing()

    def go_on(self) -> None:
        self._transport.resumeProducing()

    def leave(self) -> None:
        self._transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ended.callback(reason.type or ConnectionDone)

    @property
    def body(self) -> bytes:
        return bytes(self.received).partition(b"\r\n\r\n")[2]


class GrowingResource(Resource):
    """Serves ``/START`` or ``/START-STOP`` of a growing file, as the registry API does: the
    connection is cut if it fails.
    """

    isLeaf = True

    def __init__(self, growing: GrowingFile) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.growing = growing
        self.ends: list[Deferred[object]] = []

    def render_GET(self, request: Request) -> int:
        start, _, stop = request.path.decode()[1:].partition("-")
        if stop:
            request.setHeader(b"content-length", str(int(stop) - int(start)).encode())
        delivery = self.growing.deliver(request, int(start), int(stop) if stop else None)

        def cut(failure: Failure) -> Failure:
            if request.channel is not None:
                cast(ITCPTransport, request.channel.transport).abortConnection()
            return failure

        outcome: Deferred[object] = Deferred()
        delivery.addCallbacks(lambda _: request.finish(), cut)
        delivery.addCallbacks(
            lambda _: outcome.callback(None), lambda failure: outcome.callback(failure.type)
        )
        self.ends.append(outcome)
        return NOT_DONE_YET


async def get(url: str, path: str) -> Download:
    download = Download(path)
    port = int(url.rpartition(":")[2])
    await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), download)
    return download


@pytest_twisted.ensureDeferred
async def test_many_devices_read_while_it_is_written(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs, length=len(CONTENT), unverified_tail=CHUNK)
    resource = GrowingResource(written_file)
    source = random.Random(2)
    async with serving(resource) as url:
        await written_file.write(CONTENT[:100_000])
        ranges = [(source.randrange(len(CONTENT)), len(CONTENT)) for _ in range(20)]
        ranges += [
            (start, source.randrange(start + 1, len(CONTENT) + 1)) for start, _ in ranges[:10]
        ]
        downloads = [await get(url, f"/{start}-{stop}") for start, stop in ranges]
        stalled = downloads[::5]
        for download in stalled:
            download.stall()
        gone = await get(url, f"/0-{len(CONTENT)}")
        await gone.first
        await write_all(written_file, CONTENT[100_000:2_000_000])
        gone.leave()
        await gone.ended
        await write_all(written_file, CONTENT[2_000_000:])
        assert written_file.size == len(CONTENT)
        assert written_file.available == len(CONTENT) - CHUNK
        assert blobs.path(DIGEST) is None
        assert await written_file.finish(DIGEST) == DIGEST
        path = blobs.path(DIGEST)
        assert path is not None
        # Slow devices read on from the open file, even if its name is gone.
        path.unlink()
        for download in stalled:
            download.go_on()
        for download, (start, stop) in zip(downloads, ranges, strict=True):
            assert await download.ended is ConnectionDone
            assert download.body == CONTENT[start:stop]
        outcomes = [await outcome for outcome in resource.ends]
    assert [outcome for outcome in outcomes if outcome is not None] == [CancelledError]
    assert written_file.readers == 0


@pytest_twisted.ensureDeferred
async def test_wrong_bytes_never_complete_a_download(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs, length=len(CONTENT), unverified_tail=1)
    resource = GrowingResource(written_file)
    async with serving(resource) as url:
        whole, unknown, head = [
            await get(url, path) for path in (f"/0-{len(CONTENT)}", "/0", "/0-1000")
        ]
        await write_all(written_file, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        assert await head.ended is ConnectionDone
        assert head.body == CONTENT[:1000]
        waiting = [
            ensureDeferred(written_file.done()),
            ensureDeferred(written_file.reached(len(CONTENT))),
        ]
        with pytest.raises(DigestMismatch):
            await written_file.finish(DIGEST)
        assert [failed for failed, _ in await DeferredList(waiting, consumeErrors=True)] == [
            False,
            False,
        ]
        for download in (whole, unknown):
            assert await download.ended is ConnectionLost
        assert len(whole.body) < len(CONTENT)
        assert b"0\r\n\r\n" not in unknown.body[-5:]
        late = await get(url, "/0-10")
        assert await late.ended in (ConnectionLost, ConnectionDone)
        assert late.body == b""
    assert not list(blobs.tmp.iterdir())
    assert blobs.path(DIGEST) is None
    with pytest.raises(DigestMismatch):
        await written_file.done()
    with pytest.raises(Cancelled):
        await written_file.write(b"more")
    assert written_file.failure is not None
    assert written_file.failure.check(DigestMismatch)


@pytest_twisted.ensureDeferred
async def test_a_reader_that_stalls_costs_one_chunk(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs)
    consumer = StringTransport()
    delivery = written_file.deliver(consumer)
    producer = cast(Any, consumer.producer)
    assert verifyObject(IPushProducer, producer)
    assert not IPullProducer.providedBy(producer)
    producer.pauseProducing()
    await write_all(written_file, CONTENT, 500_000)
    assert consumer.value() == b""
    producer.resumeProducing()
    producer.pauseProducing()
    await written_file.finish()
    assert len(consumer.value()) <= CHUNK
    producer.resumeProducing()
    await delivery
    assert consumer.value() == CONTENT
    assert consumer.producer is None


@pytest_twisted.ensureDeferred
async def test_reached_waits_for_readable_bytes(blobs: BlobStore) -> None:
    written_file = blob_writer(blobs, unverified_tail=10)
    reached = ensureDeferred(written_file.reached(5))
    cancelled = ensureDeferred(written_file.reached(5))
    await written_file.write(b"x" * 15)
    assert [reached.called, cancelled.called] == [False, False]
    cancelled.cancel()
    with pytest.raises(CancelledError):
        await cancelled
    await written_file.write(b"x")
    await reached
    end = ensureDeferred(written_file.reached(1000))
    done = ensureDeferred(written_file.done())
    await written_file.finish(expected_size=16)
    await end
    await done
    assert written_file.available == written_file.length == 16


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
