"""Blobs of an upstream that misbehaves (a double: tests/support/hostile.py)."""

from __future__ import annotations

import hashlib

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred

from obdelta.errors import ManifestInvalid, UpstreamUnavailable
from obdelta.oci import Descriptor, Digest
from obdelta.registry import WrongContent
from obdelta.registry.download import max_bytes
from tests.support.clients import Memory, client_of
from tests.support.hostile import (
    Answer,
    Flood,
    chunked,
    dropping,
    hanging,
    head,
    hostile_upstream,
    ranged,
    response,
)
from tests.support.hostile_blob import ANONYMOUS, BLOB, BLOB_PATH, BODY, REPOSITORY, fetch


@pytest_twisted.ensureDeferred
async def test_a_cut_download_is_resumed_at_its_offset() -> None:
    content, ranges = await fetch(
        dropping(BODY, 300_000), ranged(BODY, at=1), ranged(BODY, at=0), ranged(BODY)
    )
    assert content == BODY
    assert ranges == [None, "bytes=300000-", "bytes=300001-", "bytes=300001-"]


@pytest_twisted.ensureDeferred
async def test_an_upstream_without_ranges_sends_everything_again() -> None:
    content, ranges = await fetch(
        dropping(BODY, 300_000), dropping(BODY, 400_000), response(200, BODY)
    )
    assert content == BODY
    assert ranges == [None, "bytes=300000-", "bytes=400000-"]


@pytest.mark.parametrize(
    "answer",
    [
        response(206, BODY[:500], content_range=f"bytes 0-499/{len(BODY)}"),
        response(206, BODY[300_001:], content_range=f"bytes 300001-{len(BODY) - 1}/{len(BODY)}"),
        response(206, BODY[300_000:], content_range=f"bytes 300000-{len(BODY) - 1}/*"),
        response(206, BODY[300_000:]),
        response(416, b"", content_range=f"bytes */{len(BODY)}"),
    ],
    ids=["from the start", "one byte late", "no total", "no content-range", "unsatisfiable"],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_range_is_not_used(answer: Answer) -> None:
    content, ranges = await fetch(dropping(BODY, 300_000), answer, response(200, BODY))
    assert content == BODY
    assert ranges == [None, "bytes=300000-", None]


@pytest_twisted.ensureDeferred
async def test_a_complete_chunked_body_needs_no_last_chunk() -> None:
    content, ranges = await fetch(chunked(BODY, piece=len(BODY), whole=False))
    assert (content, ranges) == (BODY, [None])


@pytest_twisted.ensureDeferred
async def test_chunks_of_one_byte_are_read() -> None:
    body = BODY[:20_000]
    small = Descriptor("", Digest.of(body), len(body))
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(f"/v2/{REPOSITORY}/blobs/{small.digest}", chunked(body))
        sink = Memory()
        await client.blob(REPOSITORY, small, ANONYMOUS, sink)
    assert bytes(sink.content) == body
    assert sink.writes < 20  # joined; one, unless this machine was slow in between


@pytest_twisted.ensureDeferred
async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    def closing(body: bytes) -> Answer:
        def answer(connection: object) -> None:
            connection.transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)  # type: ignore[attr-defined]
            connection.transport.loseConnection()  # type: ignore[attr-defined]

        return answer

    content, ranges = await fetch(closing(BODY[:1000]), closing(BODY))
    assert (content, ranges) == (BODY, [None, "bytes=1000-"])


@pytest_twisted.ensureDeferred
async def test_wrong_bytes_are_refused() -> None:
    with pytest.raises(WrongContent, match="other bytes than those of blob"):
        await fetch(response(200, BODY[:-1] + b"?"))


@pytest_twisted.ensureDeferred
async def test_wrong_bytes_after_a_resume_are_refused() -> None:
    other = bytes(len(BODY))
    with pytest.raises(WrongContent):
        await fetch(dropping(BODY, 300_000), ranged(other))


@pytest.mark.parametrize(
    "answer",
    [
        response(200, BODY[:-1]),
        response(200, BODY + b"+"),
        chunked(BODY[:-1], piece=9999),
        chunked(BODY + b"+", piece=9999),
    ],
    ids=["short", "long", "short and chunked", "long and chunked"],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_size_is_refused(answer: Answer) -> None:
    with pytest.raises(UpstreamUnavailable):
        await fetch(answer)


@pytest.mark.parametrize("declared", [0, 1, len(BODY) - 1, len(BODY) + 1, len(BODY) + 500_000])
@pytest.mark.parametrize("chunks", [False, True])
@pytest_twisted.ensureDeferred
async def test_the_digest_decides_and_not_the_size_in_the_manifest(
    declared: int, chunks: bool
) -> None:
    wrong = Descriptor("", BLOB.digest, declared)
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, chunked(BODY, piece=50_000) if chunks else response(200, BODY))
        sink = Memory()
        await client.blob(REPOSITORY, wrong, ANONYMOUS, sink)
        assert bytes(sink.content) == BODY
        assert await client.small_blob(REPOSITORY, wrong, ANONYMOUS, 4 << 20) == BODY
        assert len(upstream.seen) == 2


@pytest_twisted.ensureDeferred
async def test_a_wrong_size_does_not_prevent_a_resume() -> None:
    wrong = Descriptor("", BLOB.digest, len(BODY) + 1)
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, dropping(BODY, 300_000), ranged(BODY))
        sink = Memory()
        await client.blob(REPOSITORY, wrong, ANONYMOUS, sink)
        assert bytes(sink.content) == BODY
        assert [seen.header("range") for seen in upstream.seen] == [None, "bytes=300000-"]


@pytest.mark.parametrize(
    "answer",
    [
        response(200),
        response(200, BODY[:1000]),
        response(200, b"<html>later</html>"),
        response(200, bytes(len(BODY))),
    ],
    ids=["empty", "short", "a page", "other bytes"],
)
@pytest_twisted.ensureDeferred
async def test_a_body_with_a_wrong_digest_is_requested_again(answer: Answer) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, answer, response(200, BODY))
        assert await client.small_blob(REPOSITORY, BLOB, ANONYMOUS, 4 << 20) == BODY
        upstream.script(BLOB_PATH, answer)
        with pytest.raises(UpstreamUnavailable):
            await client.small_blob(REPOSITORY, BLOB, ANONYMOUS, 4 << 20)


@pytest_twisted.ensureDeferred
async def test_more_bytes_than_declared_are_cut_at_once() -> None:
    flood = Flood(status_line=head(200, {"transfer-encoding": "chunked"}) + b"%x\r\n" % (1 << 40))
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, flood)
        sink = Memory()
        with pytest.raises(WrongContent, match="more bytes"):
            await client.blob(REPOSITORY, BLOB, ANONYMOUS, sink)
        assert len(sink.content) <= max_bytes(len(BODY))
        await upstream.connections[0].gone  # closed by us, because the upstream never ends


@pytest_twisted.ensureDeferred
async def test_downloads_fail_after_several_attempts() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, dropping(BODY, 10))
        with pytest.raises(UpstreamUnavailable, match="dropped the connection"):
            await client.blob(REPOSITORY, BLOB, ANONYMOUS, Memory())
        assert len(upstream.seen) == 4


@pytest_twisted.ensureDeferred
async def test_progress_resets_the_count_of_failures() -> None:
    body = hashlib.shake_128(b"long").digest(9 * 1024 * 1024)
    descriptor = Descriptor("", Digest.of(body), len(body))
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        path = f"/v2/{REPOSITORY}/blobs/{descriptor.digest}"
        upstream.script(path, *[ranged(body, at=1024 * 1024)] * 8, ranged(body))
        sink = Memory()
        await client.blob(REPOSITORY, descriptor, ANONYMOUS, sink)
        assert Digest.of(bytes(sink.content)) == descriptor.digest
        assert len(upstream.seen) == 9


@pytest_twisted.ensureDeferred
async def test_a_stalled_upstream_is_cut() -> None:
    start = head(200, {"content-length": str(len(BODY))}) + BODY[:5000]
    content, ranges = await fetch(hanging(start), ranged(BODY), idle=0.2)
    assert (content, ranges) == (BODY, [None, "bytes=5000-"])


@pytest_twisted.ensureDeferred
async def test_a_failed_write_ends_the_download() -> None:
    class Full:
        async def write(self, chunk: bytes) -> None:
            raise OSError(28, "No space left on device")

    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        large = Descriptor("", BLOB.digest, 1 << 40)
        upstream.script(BLOB_PATH, Flood())
        with pytest.raises(OSError, match="No space left"):
            await client.blob(REPOSITORY, large, ANONYMOUS, Full())
        await upstream.connections[0].gone
        assert len(upstream.seen) == 1


@pytest_twisted.ensureDeferred
async def test_a_slow_writer_slows_the_upstream() -> None:
    class Stuck:
        def __init__(self) -> None:
            self.entered: Deferred[None] = Deferred()
            self.release: Deferred[None] = Deferred()

        async def write(self, chunk: bytes) -> None:
            if not self.entered.called:
                self.entered.callback(None)
                await self.release

    flood, sink = Flood(64 * 1024 * 1024), Stuck()
    body = bytes(flood.size)
    descriptor = Descriptor("", Digest.of(body), len(body))
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(f"/v2/{REPOSITORY}/blobs/{descriptor.digest}", flood)
        download = ensureDeferred(client.blob(REPOSITORY, descriptor, ANONYMOUS, sink))
        await sink.entered
        await flood.stalled
        # Bytes in flight: two megabytes here, the rest in the kernel's buffers of both sides.
        assert flood.sent < 24 * 1024 * 1024
        sink.release.callback(None)
        await download
        assert flood.sent == flood.size


@pytest_twisted.ensureDeferred
async def test_cancelling_closes_the_connection() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        for answer in (
            hanging(),
            hanging(head(200, {"content-length": str(len(BODY))}) + BODY[:5000]),
        ):
            came: Deferred[None] = Deferred()

            def arrive(
                connection: object, answer: Answer = answer, came: Deferred[None] = came
            ) -> None:
                answer(connection)  # type: ignore[arg-type]
                came.callback(None)

            upstream.script(BLOB_PATH, arrive)
            download = ensureDeferred(client.blob(REPOSITORY, BLOB, ANONYMOUS, Memory()))
            await came
            download.cancel()
            with pytest.raises(CancelledError):
                await download
            await upstream.connections[-1].gone
        assert len(upstream.seen) == 2  # nothing was tried again


@pytest_twisted.ensureDeferred
async def test_a_small_blob_is_not_read_when_it_is_declared_large() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        with pytest.raises(ManifestInvalid, match="over 1000"):
            await client.small_blob(REPOSITORY, BLOB, ANONYMOUS, 1000)
        assert upstream.seen == []
