"""Requests that are proxied to a real registry."""

from __future__ import annotations

import pytest
import pytest_twisted
from twisted.web.http_headers import Headers

from bench.images import Image, push
from obdelta.errors import Denied
from obdelta.oci.manifest import DOCKER_MANIFEST, OCI_MANIFEST
from obdelta.registry import Credentials, ProxiedRequest
from tests.support.clients import Consumer, client_of
from tests.support.pushed_image import ANONYMOUS, BUILDER, image, pushed
from tests.support.registry import RunningRegistry, plain_registry, token_registry

__all__ = ["image", "plain_registry", "pushed", "token_registry"]


def get(
    path: str, credentials: Credentials = ANONYMOUS, repository: str | None = None, **headers: str
) -> ProxiedRequest:
    """Sends a GET as a device does; ``if_none_match="…"`` gives ``If-None-Match``."""
    named = Headers(
        {name.replace("_", "-").encode(): [value.encode()] for name, value in headers.items()}
    )
    return ProxiedRequest(b"GET", path, named, credentials, repository)


@pytest_twisted.ensureDeferred
async def test_proxied_responses_equal_those_of_the_registry(
    pushed: Image, plain_registry: RunningRegistry
) -> None:
    layer = pushed.layers[1]
    content = layer.path.read_bytes()
    async with client_of(plain_registry.url) as client:
        ping = await client.relay(get("/v2/"))
        assert ping.status == 200
        consumer = Consumer()
        await ping.deliver(consumer)
        assert bytes(consumer.content) == b"{}"

        whole = await client.relay(get(f"/v2/client/app/blobs/{layer.digest}"))
        consumer = Consumer()
        await whole.deliver(consumer)
        assert (whole.status, whole.length, bytes(consumer.content)) == (200, len(content), content)
        assert whole.headers.getRawHeaders(b"content-length") == [b"%d" % len(content)]
        assert whole.headers.getRawHeaders(b"docker-content-digest") == [str(layer.digest).encode()]

        part = await client.relay(get(f"/v2/client/app/blobs/{layer.digest}", range="bytes=100-"))
        consumer = Consumer()
        await part.deliver(consumer)
        assert (part.status, bytes(consumer.content)) == (206, content[100:])
        size = len(content)
        assert part.headers.getRawHeaders(b"content-range") == [
            b"bytes 100-%d/%d" % (size - 1, size)
        ]

        same = await client.relay(
            get(
                "/v2/client/app/manifests/latest",
                if_none_match=f'"{pushed.digest}"',
                accept=DOCKER_MANIFEST,
            )
        )
        await same.deliver(Consumer())
        assert (same.status, same.headers.hasHeader(b"content-length")) == (304, False)

        missing = await client.relay(get("/v2/client/app/manifests/none"))
        consumer = Consumer()
        await missing.deliver(consumer)
        assert missing.status == 404 and b"MANIFEST_UNKNOWN" in consumer.content

        tags = await client.relay(
            ProxiedRequest(b"GET", "/v2/client/app/tags/list", Headers(), ANONYMOUS, None, b"n=1")
        )
        consumer = Consumer()
        await tags.deliver(consumer)
        assert (tags.status, bytes(consumer.content)) == (
            200,
            b'{"name":"client/app","tags":["latest"]}\n',
        )


@pytest_twisted.ensureDeferred
async def test_head_and_several_accept_headers_are_proxied(
    pushed: Image, plain_registry: RunningRegistry
) -> None:
    headers = Headers({b"accept": [OCI_MANIFEST.encode(), DOCKER_MANIFEST.encode()]})
    async with client_of(plain_registry.url) as client:
        answer = await client.relay(
            ProxiedRequest(b"HEAD", "/v2/client/app/manifests/latest", headers, ANONYMOUS)
        )
        await answer.deliver(Consumer())
        assert (answer.status, answer.length) == (200, 0)
        assert answer.headers.getRawHeaders(b"content-length") == [b"%d" % len(pushed.manifest)]
        assert answer.headers.getRawHeaders(b"content-type") == [DOCKER_MANIFEST.encode()]
        assert answer.headers.getRawHeaders(b"docker-content-digest") == [
            str(pushed.digest).encode()
        ]


@pytest_twisted.ensureDeferred
async def test_proxied_requests_carry_the_clients_credentials(
    image: Image, token_registry: RunningRegistry
) -> None:
    tokens = token_registry.tokens
    assert tokens is not None
    push(
        image,
        token_registry.url,
        "v2/fff",
        "latest",
        authorization=tokens.push_authorization("v2/fff"),
    )
    path = "/v2/v2/fff/manifests/latest"
    async with client_of(token_registry.url) as client:
        refused = await client.relay(get(path, repository="v2/fff"))
        consumer = Consumer()
        await refused.deliver(consumer)
        assert refused.status == 401 and b"UNAUTHORIZED" in consumer.content
        challenge = (refused.headers.getRawHeaders(b"www-authenticate") or [b""])[0].decode()
        assert (
            challenge.startswith(f'Bearer realm="{tokens.url}",service=') and "scope=" in challenge
        )

        tokens.requests.clear()
        for _ in range(2):
            built = await client.relay(get(path, BUILDER, "v2/fff", accept=DOCKER_MANIFEST))
            consumer = Consumer()
            await built.deliver(consumer)
            assert (built.status, bytes(consumer.content)) == (200, image.manifest)
        assert [request.scopes for request in tokens.requests] == [["repository:v2/fff:pull"]]

        ping = await client.relay(get("/v2/", BUILDER))
        ping.cancel()
        assert (ping.status, tokens.requests[-1].scopes) == (200, [])

        with pytest.raises(Denied):
            await client.relay(get(path, Credentials.anonymous(exchange=True), "v2/fff"))
