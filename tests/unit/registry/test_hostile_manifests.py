"""Manifests of an upstream that misbehaves (a double: tests/support/hostile.py), and its errors."""

from __future__ import annotations

import json

import pytest
import pytest_twisted

from obdelta.errors import (
    BadRequest,
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    ObdeltaError,
    TooManyRequests,
    Unauthorized,
    UpstreamUnavailable,
)
from obdelta.oci import Digest
from obdelta.oci.manifest import DOCKER_MANIFEST, MAX_MANIFEST, OCI_MANIFEST
from obdelta.registry import Credentials
from tests.support.clients import Memory, client_of
from tests.support.hostile import (
    Answer,
    Connection,
    Flood,
    dropping,
    hanging,
    head,
    hostile_upstream,
    response,
    small_manifest,
)
from tests.support.hostile_blob import ANONYMOUS, BLOB, BLOB_PATH, BODY, REPOSITORY, fetch

SECRET = Credentials.bearer("s3cret")
MANIFEST_PATH = f"/v2/{REPOSITORY}/manifests/latest"
MANIFEST = small_manifest()


def error_body(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "m", "detail": None}]}).encode()


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
