"""Checks whether a registry has a blob, with one that treats HEAD badly (a double: no real one
does all of this).
"""

from __future__ import annotations

import pytest
import pytest_twisted
from twisted.web.http_headers import Headers

from obdelta.errors import BlobUnknown, Denied, Unauthorized, UpstreamUnavailable
from obdelta.oci import Digest
from obdelta.registry import Credentials, ProxiedRequest
from tests.support.clients import client_of
from tests.support.hostile import Answer, Connection, chunked, hostile_upstream, response

BODY = b"blob" * 5000
DIGEST = Digest.of(BODY)
PATH = f"/v2/v2/app/blobs/{DIGEST}"
SECRET = Credentials.bearer("s3cret")


def refusing_head(head: Answer, get: Answer | None = None) -> Answer:
    given = get or response(200, BODY)

    def answer(connection: Connection) -> None:
        assert connection.request is not None
        (head if connection.request.method == "HEAD" else given)(connection)

    return answer


@pytest.mark.parametrize("status", [400, 405, 500, 501, 503])
@pytest_twisted.ensureDeferred
async def test_a_registry_that_refuses_head_gets_a_get(status: int) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, refusing_head(response(status)))
        assert await client.blob_size("v2/app", DIGEST, SECRET) == len(BODY)
        assert [seen.method for seen in upstream.seen] == ["HEAD", "GET"]
        upstream.script(PATH, refusing_head(response(status), response(404)))
        with pytest.raises(BlobUnknown):
            await client.blob_size("v2/app", DIGEST, SECRET)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500, 501])
@pytest_twisted.ensureDeferred
async def test_storage_signed_for_get_only_gets_a_get(status: int) -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(PATH, response(307, location=f"{storage.url}/blob?signature=1"))
        storage.script("/blob", refusing_head(response(status)))
        assert await client.blob_size("v2/app", DIGEST, SECRET) == len(BODY)
        assert [seen.method for seen in storage.seen] == ["HEAD", "GET"]
        # The same for a device's own HEAD.
        request = ProxiedRequest(b"HEAD", PATH, Headers(), SECRET, "v2/app")
        answer = await client.relay(request)
        assert (answer.status, answer.headers.getRawHeaders(b"content-length")) == (
            200,
            [b"%d" % len(BODY)],
        )
        answer.cancel()


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
@pytest_twisted.ensureDeferred
async def test_a_refusal_of_storage_is_a_transient_error(status: int) -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(PATH, response(307, location=f"{storage.url}/blob?signature=1"))
        storage.script("/blob", response(status))
        with pytest.raises(UpstreamUnavailable):
            await client.blob_size("v2/app", DIGEST, SECRET)
        for method in (b"HEAD", b"GET"):
            with pytest.raises(UpstreamUnavailable):
                await client.relay(ProxiedRequest(method, PATH, Headers(), SECRET, "v2/app"))


@pytest.mark.parametrize(
    ("status", "expected"), [(401, Unauthorized), (403, Denied), (404, BlobUnknown)]
)
@pytest_twisted.ensureDeferred
async def test_the_registry_s_own_refusal_is_final(status: int, expected: type[Exception]) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, refusing_head(response(status)))
        with pytest.raises(expected):
            await client.blob_size("v2/app", DIGEST, SECRET)
        assert [seen.method for seen in upstream.seen] == ["HEAD"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest_twisted.ensureDeferred
async def test_transient_errors_are_retried(status: int) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, response(status), response(status), response(200, BODY))
        assert await client.blob_size("v2/app", DIGEST, SECRET) == len(BODY)
        assert len(upstream.seen) == 3


@pytest_twisted.ensureDeferred
async def test_a_size_that_is_not_given_is_unknown() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        for answer in (
            refusing_head(response(405), chunked(BODY, piece=5000)),
            refusing_head(response(200)),
        ):
            upstream.script(PATH, answer)
            assert await client.blob_size("v2/app", DIGEST, SECRET) is None
