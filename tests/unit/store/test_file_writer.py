"""Files that devices read over real connections while a thread writes them."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, DeferredList, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IPullProducer, IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface.verify import verifyObject

from obdelta.concurrency.tasks import Threads
from obdelta.errors import Cancelled, DigestMismatch
from obdelta.store.blobs import BlobStore
from obdelta.store.file_writer import FileWriter
from obdelta.store.growing_file import CHUNK, GrowingFile
from tests.support.store import blob_writer
from tests.support.web import reactor, serving
from tests.support.written_files import CONTENT, DIGEST, blobs, threads, write_all

__all__ = ["blobs", "threads"]


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
