"""Redirects of an upstream that misbehaves (a double: tests/support/hostile.py)."""

from __future__ import annotations

import hashlib

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from obdelta.errors import BlobUnknown, ObdeltaError, UpstreamUnavailable
from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials
from obdelta.registry.http.transport import Http
from tests.support.clients import Memory, client_of
from tests.support.hostile import dropping, hostile_upstream, ranged, response

ANONYMOUS = Credentials.anonymous()
SECRET = Credentials.bearer("s3cret")
REPOSITORY = "v2/app"
BODY = hashlib.shake_128(b"blob").digest(700_000)
BLOB = Descriptor("application/octet-stream", Digest.of(BODY), len(BODY))
BLOB_PATH = f"/v2/{REPOSITORY}/blobs/{BLOB.digest}"


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
