"""The upstream client against an upstream that misbehaves (a double: tests/support/hostile.py):
manifests and blobs.
"""

from __future__ import annotations

import hashlib
import json

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from obdelta.errors import (
    BadRequest,
    BlobUnknown,
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    ObdeltaError,
    TooManyRequests,
    Unauthorized,
    UpstreamUnavailable,
)
from obdelta.oci import Descriptor, Digest
from obdelta.oci.manifest import DOCKER_MANIFEST, MAX_MANIFEST, OCI_MANIFEST
from obdelta.registry import Credentials, WrongContent
from obdelta.registry.download import max_bytes
from obdelta.registry.http.transport import Http
from tests.support.clients import Memory, client_of
from tests.support.hostile import (
    Answer,
    Connection,
    Flood,
    chunked,
    dropping,
    hanging,
    head,
    hostile_upstream,
    ranged,
    response,
    small_manifest,
)

ANONYMOUS = Credentials.anonymous()
SECRET = Credentials.bearer("s3cret")
REPOSITORY = "v2/app"
MANIFEST_PATH = f"/v2/{REPOSITORY}/manifests/latest"
BODY = hashlib.shake_128(b"blob").digest(700_000)
BLOB = Descriptor("application/octet-stream", Digest.of(BODY), len(BODY))
BLOB_PATH = f"/v2/{REPOSITORY}/blobs/{BLOB.digest}"
MANIFEST = small_manifest()


def error_body(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "m", "detail": None}]}).encode()


async def fetch(
    *answers: Answer, path: str = BLOB_PATH, idle: float = 20.0
) -> tuple[bytes, list[str | None]]:
    """Returns the blob, and the Range header of each request for it."""
    async with hostile_upstream() as upstream, client_of(upstream.url, idle=idle) as client:
        upstream.script(path, *answers)
        sink = Memory()
        await client.blob(REPOSITORY, BLOB, ANONYMOUS, sink)
        return bytes(sink.content), [seen.header("range") for seen in upstream.seen]


# -- blobs -------------------------------------------------------------------------------------


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


# -- manifests ---------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_huge_manifest_is_refused_without_reading_it() -> None:
    announced = Flood(50 * 1024 * 1024)
    unannounced = Flood(
        status_line=head(200, {"transfer-encoding": "chunked"}) + b"%x\r\n" % (1 << 40)
    )
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        for flood in (announced, unannounced):
            upstream.script(MANIFEST_PATH, flood)
            with pytest.raises(ManifestInvalid, match=f"larger than {MAX_MANIFEST}"):
                await client.manifest(REPOSITORY, "latest", ANONYMOUS)
            await upstream.connections[-1].gone
        assert announced.sent < 24 * 1024 * 1024
        assert len(upstream.seen) == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response(200, b"<html>", content_type=DOCKER_MANIFEST), ManifestInvalid),
        (response(200, b"[" * 100_000, content_type=DOCKER_MANIFEST), ManifestInvalid),
        (response(200, b"{}", content_type=DOCKER_MANIFEST), ManifestInvalid),
        (response(200, MANIFEST.replace(b"image.v1+json", b"x" * 1_000_000)), ManifestInvalid),
        (response(401, b"", www_authenticate='Bearer realm="https://r/t"'), Unauthorized),
        (response(403, error_body("DENIED")), Denied),
        (response(404, error_body("MANIFEST_UNKNOWN")), ManifestUnknown),
        (response(404, error_body("NAME_UNKNOWN")), NameUnknown),
        (response(404, b"\xff not json"), ManifestUnknown),
        (response(404, b'{"errors": {"code": 7}}'), ManifestUnknown),
        (response(410, b""), ManifestUnknown),
        (response(400, error_body("NAME_INVALID")), BadRequest),
        (response(400, b"bad gateway software"), UpstreamUnavailable),
        (response(405, error_body("UNSUPPORTED")), UpstreamUnavailable),
        (response(204), UpstreamUnavailable),
        (response(304), UpstreamUnavailable),
        (response(501), UpstreamUnavailable),
        (response(302), UpstreamUnavailable),
        (response(302, location="ftp://elsewhere/"), UpstreamUnavailable),
        (response(302, location="http://exa\tmple.com/"), UpstreamUnavailable),
        (response(302, location="http://user:pw@/"), UpstreamUnavailable),
        (response(302, location="http://127.0.0.1:99999/"), UpstreamUnavailable),
        (response(302, location="http://under_score.example/"), UpstreamUnavailable),
        (response(302, location="http://.../"), UpstreamUnavailable),
    ],
)
@pytest_twisted.ensureDeferred
async def test_final_errors_are_not_retried(answer: Answer, expected: type[ObdeltaError]) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(MANIFEST_PATH, answer)
        with pytest.raises(expected) as raised:
            await client.manifest(REPOSITORY, "latest", SECRET)
        assert "\n" not in str(raised.value) and "s3cret" not in str(raised.value)
        assert len(upstream.seen) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response(500, b"oops"), UpstreamUnavailable),
        (response(502), UpstreamUnavailable),
        (response(503), UpstreamUnavailable),
        (response(504), UpstreamUnavailable),
        (response(429), TooManyRequests),
        (response(429, retry_after="0"), TooManyRequests),
        (response(429, retry_after="soon"), TooManyRequests),
        (hanging(b"HTTP/1.1 200 OK\r\n"), UpstreamUnavailable),
        (hanging(b"SSH-2.0-OpenSSH_9.2\r\n"), UpstreamUnavailable),
        (response(200, MANIFEST, transfer_encoding="gzip"), UpstreamUnavailable),
        (response(200, MANIFEST, content_length="-5"), UpstreamUnavailable),
        (response(999, MANIFEST), UpstreamUnavailable),
        (response(-200, MANIFEST), UpstreamUnavailable),
        (Connection.drop, UpstreamUnavailable),
        (dropping(MANIFEST, 100), UpstreamUnavailable),
    ],
)
@pytest_twisted.ensureDeferred
async def test_transient_errors_are_retried(answer: Answer, expected: type[ObdeltaError]) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url, idle=0.2) as client:
        upstream.script(MANIFEST_PATH, answer)
        with pytest.raises(expected):
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        assert len(upstream.seen) == 4
        good = response(200, MANIFEST, content_type=DOCKER_MANIFEST)
        upstream.script(MANIFEST_PATH, answer, answer, good)
        found = await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        assert found.digest == Digest.of(MANIFEST)


@pytest_twisted.ensureDeferred
async def test_a_long_retry_after_is_reported_and_not_waited_for() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(MANIFEST_PATH, response(429, retry_after="3600"))
        with pytest.raises(TooManyRequests) as raised:
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        assert raised.value.retry_after == 3600.0
        assert len(upstream.seen) == 1
        now, then = "Tue, 01 Jul 2025 10:00:00 GMT", "Tue, 01 Jul 2025 10:02:00 GMT"
        upstream.script(MANIFEST_PATH, response(429, date=now, retry_after=then))
        with pytest.raises(TooManyRequests) as raised:
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        assert raised.value.retry_after == 120.0


@pytest_twisted.ensureDeferred
async def test_a_manifest_must_have_the_requested_digest() -> None:
    other_digest = Digest.of(b"another")
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(
            f"/v2/{REPOSITORY}/manifests/{other_digest}",
            response(200, MANIFEST, content_type=DOCKER_MANIFEST),
        )
        with pytest.raises(
            UpstreamUnavailable, match=f"has digest {Digest.of(MANIFEST)}, not '{other_digest}'"
        ):
            await client.manifest(REPOSITORY, str(other_digest), ANONYMOUS)
        assert len(upstream.seen) == 4


@pytest.mark.parametrize(
    "answer",
    [
        response(200, b"", content_type=DOCKER_MANIFEST),
        response(200, b" \n", content_type=DOCKER_MANIFEST),
        response(200, MANIFEST[:100], content_type=DOCKER_MANIFEST),
        response(
            200, MANIFEST, content_type=DOCKER_MANIFEST, docker_content_digest="sha256:" + "0" * 64
        ),
        response(200, MANIFEST, content_type=DOCKER_MANIFEST, docker_content_digest="sha256:short"),
    ],
    ids=["empty", "blank", "short", "another digest", "no digest"],
)
@pytest_twisted.ensureDeferred
async def test_an_incomplete_manifest_is_requested_again(answer: Answer) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(
            MANIFEST_PATH, answer, response(200, MANIFEST, content_type=DOCKER_MANIFEST)
        )
        assert (await client.manifest(REPOSITORY, "latest", ANONYMOUS)).digest == Digest.of(
            MANIFEST
        )
        assert len(upstream.seen) == 2
        upstream.script(MANIFEST_PATH, answer)
        with pytest.raises(UpstreamUnavailable):
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)


@pytest_twisted.ensureDeferred
async def test_requests_and_their_headers() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(
            MANIFEST_PATH,
            response(200, MANIFEST, content_type=DOCKER_MANIFEST, set_cookie="a=1; Path=/"),
        )
        upstream.script(BLOB_PATH, response(200, BODY, set_cookie="b=2; Path=/"))
        await client.manifest(REPOSITORY, "latest", SECRET)
        await client.blob(REPOSITORY, BLOB, SECRET, Memory())
        await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        first, second, third = upstream.seen
        assert len(first.headers["accept"]) == 4 and OCI_MANIFEST in first.headers["accept"]
        assert first.header("accept-encoding") == second.header("accept-encoding") == "identity"
        assert len(second.headers["accept-encoding"]) == 1
        assert first.header("authorization") == second.header("authorization") == "Bearer s3cret"
        assert "authorization" not in third.headers
        assert not any("cookie" in seen.headers for seen in upstream.seen)
        assert (first.header("user-agent") or "").startswith("obdelta/")
        assert len(upstream.connections) == 1  # kept and used again


@pytest_twisted.ensureDeferred
async def test_a_body_with_content_encoding_is_not_decoded() -> None:
    content, _ = await fetch(response(200, BODY, content_encoding="gzip"))
    assert content == BODY


@pytest_twisted.ensureDeferred
async def test_an_unreachable_upstream_is_a_transient_error() -> None:
    async with hostile_upstream() as upstream:
        url = upstream.url
    async with client_of(url) as client:
        with pytest.raises(UpstreamUnavailable, match=r"cannot connect to 127\.0\.0\.1"):
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: " + b"a" * 8000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nx: y\r\n", b" " + b"a" * 8000 + b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 300),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_endless_response_head_is_cut(first: bytes, more: bytes) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(MANIFEST_PATH, hanging(first + more * 40))
        with pytest.raises(
            UpstreamUnavailable, match="dropped the connection or sent something that is not HTTP"
        ):
            await client.manifest(REPOSITORY, "latest", ANONYMOUS)
        assert len(upstream.seen) == 4


@pytest_twisted.ensureDeferred
async def test_a_long_response_head_is_read() -> None:
    content, _ = await fetch(
        response(200, BODY, **{f"x_{number}": "a" * 8000 for number in range(12)})
    )
    assert content == BODY


# -- redirects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest_twisted.ensureDeferred
async def test_a_redirect_to_storage_keeps_the_range_and_drops_credentials(status: int) -> None:
    signed = '/bucket/blob?X-Amz-Signature=a%2Bb%2F%3D&X-Amz-SignedHeaders=host&name="a|b"'
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(BLOB_PATH, response(status, b"see there", location=storage.url + signed))
        storage.script("/bucket/blob", dropping(BODY, 1000), ranged(BODY))
        sink = Memory()
        await client.blob(REPOSITORY, BLOB, SECRET, sink)
        assert bytes(sink.content) == BODY
        assert [seen.path for seen in storage.seen] == [signed, signed]
        assert [seen.header("range") for seen in storage.seen] == [None, "bytes=1000-"]
        assert not any({"authorization", "cookie"} & seen.headers.keys() for seen in storage.seen)
        # Each attempt begins at the registry, because an earlier signed URL may have expired.
        assert [seen.header("authorization") for seen in upstream.seen] == ["Bearer s3cret"] * 2


@pytest.mark.parametrize(
    ("location", "other_digest", "authorization"),
    [
        ("/a b?c d=e f", "/a%20b?c%20d=e%20f", None),
        ("/gr\u00f6\u00dfe/\u2603?n=\u00f6", "/gr%C3%B6%C3%9Fe/%E2%98%83?n=%C3%B6", None),
        ("/a%20b?x=%2F#part", "/a%20b?x=%2F", None),
        ("http://user:pass%40word@HOST/there", "/there", "Basic dXNlcjpwYXNzQHdvcmQ="),
        ("http://user@HOST/there", "/there", "Basic dXNlcjo="),
        ("//HOST/there", "/there", None),
        ("http://HOST", "/", None),
        ("http://HOST?x=1", "/?x=1", None),
    ],
)
@pytest_twisted.ensureDeferred
async def test_redirect_locations_are_resolved_as_in_go(
    location: str, other_digest: str, authorization: str | None
) -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        there = storage if "HOST" in location else upstream
        named = (
            location.replace("HOST", storage.url.removeprefix("http://")).encode().decode("latin-1")
        )
        upstream.script(BLOB_PATH, response(307, location=named))
        there.script(other_digest.partition("?")[0], response(200, BODY))
        sink = Memory()
        await client.blob(REPOSITORY, BLOB, SECRET, sink)
        assert bytes(sink.content) == BODY
        seen = there.seen[-1]
        assert seen.path == other_digest
        assert seen.header("authorization") == (
            "Bearer s3cret" if there is upstream else authorization
        )


@pytest_twisted.ensureDeferred
async def test_a_login_in_a_location_is_sent_only_to_its_origin() -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        hostile_upstream() as other,
        client_of(upstream.url) as client,
    ):
        host = storage.url.removeprefix("http://")
        upstream.script(BLOB_PATH, response(307, location=f"http://user:pass@{host}/first"))
        storage.script("/first", response(307, location="/second"))
        storage.script("/second", response(307, location=f"{other.url}/third"))
        other.script("/third", response(200, BODY))
        await client.blob(REPOSITORY, BLOB, SECRET, Memory())
        assert [seen.header("authorization") for seen in storage.seen] == ["Basic dXNlcjpwYXNz"] * 2
        assert other.seen[0].header("authorization") is None


def test_an_upstream_may_have_an_ipv6_address() -> None:
    other_digest: list[bytes] = []

    @implementer(IAgent)
    class UnusedAgent:
        """A double: not every machine that runs this has IPv6."""

        def request(
            self, method: bytes, uri: bytes, headers: object = None, body: object = None
        ) -> Deferred[IResponse]:
            other_digest.append(uri)
            return Deferred()

    request = ensureDeferred(
        Http(UnusedAgent(), Clock()).request(b"GET", "http://[::1]:5000/v2/", Headers())
    )
    assert other_digest == [b"http://[::1]:5000/v2/"]
    request.addErrback(lambda failure: failure.trap(CancelledError))
    request.cancel()


@pytest_twisted.ensureDeferred
async def test_credentials_are_kept_only_within_the_registry() -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(BLOB_PATH, response(307, location="/elsewhere"))
        upstream.script("/elsewhere", response(307, location=f"{storage.url}/there"))
        storage.script("/there", response(307, location=f"{upstream.url}/home"))
        upstream.script("/home", response(200, BODY))
        await client.blob(REPOSITORY, BLOB, SECRET, Memory())
        assert [(seen.path, seen.header("authorization")) for seen in upstream.seen] == [
            (BLOB_PATH, "Bearer s3cret"),
            ("/elsewhere", "Bearer s3cret"),
            ("/home", None),
        ]


@pytest_twisted.ensureDeferred
async def test_endless_redirects_are_an_error() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(BLOB_PATH, response(307, location=BLOB_PATH))
        with pytest.raises(UpstreamUnavailable, match="redirects more than 5 times"):
            await client.blob(REPOSITORY, BLOB, ANONYMOUS, Memory())
        assert len(upstream.seen) == 6


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, UpstreamUnavailable), (403, UpstreamUnavailable), (404, BlobUnknown)],
)
@pytest_twisted.ensureDeferred
async def test_a_refusal_by_storage_is_not_the_fault_of_the_client(
    status: int, expected: type[ObdeltaError]
) -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(BLOB_PATH, response(307, location=f"{storage.url}/blob"))
        storage.script("/blob", response(status, b"<Error/>"))
        with pytest.raises(expected):
            await client.blob(REPOSITORY, BLOB, SECRET, Memory())
