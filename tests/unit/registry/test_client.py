"""The upstream client against Debian's real docker-registry: open, with htpasswd, with token
authentication.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import pytest_twisted

from bench.images import Image, make_image, make_index, make_layer, push
from bench.images import file as file_entry
from obdelta.errors import BlobUnknown, Denied, ManifestUnknown, Unauthorized
from obdelta.oci import Descriptor, Digest, Index, Manifest
from obdelta.oci.manifest import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from obdelta.registry import Credentials
from tests.support.clients import Memory, client_of
from tests.support.images import make_pair
from tests.support.pushed_image import ANONYMOUS, BUILDER, image, pushed
from tests.support.registry import (
    BUILDER_TOKEN,
    PASSWORD,
    USER,
    RunningRegistry,
    basic_registry,
    plain_registry,
    token_registry,
)

__all__ = ["basic_registry", "image", "plain_registry", "pushed", "token_registry"]


@pytest_twisted.ensureDeferred
async def test_a_whole_image_is_fetched_and_verified(
    pushed: Image, plain_registry: RunningRegistry
) -> None:
    async with client_of(plain_registry.url) as client:
        by_tag = await client.manifest("client/app", "latest", ANONYMOUS)
        assert isinstance(by_tag, Manifest)
        assert (by_tag.raw, by_tag.digest, by_tag.media_type) == (
            pushed.manifest,
            pushed.digest,
            DOCKER_MANIFEST,
        )
        assert await client.manifest("client/app", str(pushed.digest), ANONYMOUS) == by_tag
        assert (
            await client.small_blob("client/app", by_tag.config, ANONYMOUS, 1 << 20)
            == pushed.config
        )
        for descriptor, layer in zip(by_tag.layers, pushed.layers, strict=True):
            sink = Memory()
            await client.blob("client/app", descriptor, ANONYMOUS, sink)
            assert bytes(sink.content) == layer.path.read_bytes()


@pytest_twisted.ensureDeferred
async def test_oci_manifests_and_indexes_are_fetched(
    tmp_path: Path, plain_registry: RunningRegistry
) -> None:
    oci = make_pair(tmp_path, format="oci").base
    index = make_index(
        [(oci, {"os": "linux", "architecture": "arm64"})], oci.layout, name="all", format="oci"
    )
    push(index, plain_registry.url, "client/multi", "all")
    async with client_of(plain_registry.url) as client:
        found = await client.manifest("client/multi", "all", ANONYMOUS)
        assert isinstance(found, Index) and found.media_type == OCI_INDEX
        entry = found.entries[0]
        assert entry.platform == "linux/arm64"
        image = await client.manifest("client/multi", str(entry.descriptor.digest), ANONYMOUS)
        assert isinstance(image, Manifest) and (image.media_type, image.raw) == (
            OCI_MANIFEST,
            oci.manifest,
        )


@pytest_twisted.ensureDeferred
async def test_missing_manifests_and_blobs_are_errors(
    pushed: Image, plain_registry: RunningRegistry
) -> None:
    missing = Descriptor("application/octet-stream", Digest("0" * 64), 10)
    async with client_of(plain_registry.url) as client:
        for repository, selector in [
            ("client/app", "no-such"),
            ("client/app", str(missing.digest)),
            ("client/none", "a"),
        ]:
            with pytest.raises(ManifestUnknown) as failure:
                await client.manifest(repository, selector, ANONYMOUS)
            assert (failure.value.repository, failure.value.reference) == (repository, selector)
        with pytest.raises(BlobUnknown) as blob_unknown:
            await client.blob("client/app", missing, ANONYMOUS, Memory())
        assert blob_unknown.value.digest == missing.digest


@pytest_twisted.ensureDeferred
async def test_a_registry_with_basic_authentication(
    image: Image, basic_registry: RunningRegistry
) -> None:
    push(
        image,
        basic_registry.url,
        "client/app",
        "latest",
        authorization=basic_registry.authorization,
    )
    async with client_of(basic_registry.url) as client:
        for right in (
            Credentials.basic(USER, PASSWORD),
            Credentials.basic(USER, PASSWORD, exchange=True),
        ):
            for _ in range(2):
                assert (await client.manifest("client/app", "latest", right)).digest == image.digest
        with pytest.raises(Unauthorized) as unauthorized:
            await client.manifest("client/app", "latest", Credentials.basic(USER, "wrong"))
        assert unauthorized.value.challenge == 'Basic realm="the test, realm"'
        with pytest.raises(Denied):
            await client.manifest(
                "client/app", "latest", Credentials.basic(USER, "wrong", exchange=True)
            )
        with pytest.raises(Denied):
            await client.manifest("client/app", "latest", Credentials.anonymous(exchange=True))


@pytest_twisted.ensureDeferred
async def test_the_builder_gets_tokens_for_exactly_the_repository(
    image: Image, token_registry: RunningRegistry
) -> None:
    tokens = token_registry.tokens
    assert tokens is not None
    push(
        image,
        token_registry.url,
        "v2/aaa",
        "latest",
        authorization=tokens.push_authorization("v2/aaa"),
    )
    push(
        image,
        token_registry.url,
        "v2/bbb",
        "latest",
        authorization=tokens.push_authorization("v2/bbb"),
    )
    tokens.requests.clear()
    async with client_of(token_registry.url) as client:
        for repository in ("v2/aaa", "v2/bbb", "v2/aaa"):
            manifest = await client.manifest(repository, "latest", BUILDER)
            assert isinstance(manifest, Manifest)
            assert (
                await client.small_blob(repository, manifest.config, BUILDER, 1 << 20)
                == image.config
            )
    requested = [(request.user, request.service, request.scopes) for request in tokens.requests]
    service = tokens.issuer.audience
    assert requested == [
        ("builder", service, ["repository:v2/aaa:pull"]),
        ("builder", service, ["repository:v2/bbb:pull"]),
    ]


@pytest_twisted.ensureDeferred
async def test_a_token_registry_refuses_clients_without_access(
    image: Image, token_registry: RunningRegistry
) -> None:
    tokens = token_registry.tokens
    assert tokens is not None
    push(
        image,
        token_registry.url,
        "v2/ccc",
        "latest",
        authorization=tokens.push_authorization("v2/ccc"),
    )
    async with client_of(token_registry.url) as client:
        # A device's own token is passed on unchanged, and the registry's challenge is returned.
        token = tokens.issuer.token([{"type": "repository", "name": "v2/ccc", "actions": ["pull"]}])
        assert (
            await client.manifest("v2/ccc", "latest", Credentials.bearer(token))
        ).digest == image.digest
        other = tokens.issuer.token([{"type": "repository", "name": "v2/ddd", "actions": ["pull"]}])
        tokens.requests.clear()
        for refused in (
            Credentials.bearer(other),
            Credentials.anonymous(),
            Credentials.basic("builder", BUILDER_TOKEN),
        ):
            with pytest.raises(Unauthorized) as unauthorized:
                await client.manifest("v2/ccc", "latest", refused)
            assert f'Bearer realm="{tokens.url}"' in (unauthorized.value.challenge or "")
            assert 'scope="repository:v2/ccc:pull"' in (unauthorized.value.challenge or "")
        assert tokens.requests == []  # A device's credentials are never exchanged.
        for own in (
            Credentials.basic("builder", "wrong", exchange=True),
            Credentials.anonymous(exchange=True),
        ):
            with pytest.raises(Denied) as denied:
                await client.manifest("v2/ccc", "latest", own)
            assert "wrong" not in str(denied.value)


@pytest_twisted.ensureDeferred
async def test_a_token_that_the_registry_refuses_is_renewed(
    image: Image, token_registry: RunningRegistry
) -> None:
    tokens = token_registry.tokens
    assert tokens is not None
    push(
        image,
        token_registry.url,
        "v2/eee",
        "latest",
        authorization=tokens.push_authorization("v2/eee"),
    )
    valid, issuer = tokens.answer, tokens.issuer
    answers = [issuer.token([], exp=1), None]  # an expired token with a longer announced lifetime

    def answer(authorization: str | None, query: str) -> tuple[int, dict[str, object]]:
        stale = answers.pop(0) if answers else None
        status, body = valid(authorization, query)
        return (200, {"token": stale, "expires_in": 3600}) if stale else (status, body)

    tokens.answer = answer  # type: ignore[method-assign]
    try:
        async with client_of(token_registry.url) as client:
            first = client.manifest("v2/eee", "latest", BUILDER)
            with pytest.raises(Denied):
                await (
                    first
                )  # The refused token was new, so there is no better one for this request …
            assert (await client.manifest("v2/eee", "latest", BUILDER)).digest == image.digest
    finally:
        tokens.answer = valid  # type: ignore[method-assign]


@pytest_twisted.ensureDeferred
async def test_a_large_layer_through_a_real_registry(
    tmp_path: Path, plain_registry: RunningRegistry
) -> None:
    noise = hashlib.shake_128(b"noise").digest(24 * 1024 * 1024)
    layer = make_layer([file_entry("noise", noise)], tmp_path / "blobs", compression="plain")
    push(make_image([layer], tmp_path / "layout"), plain_registry.url, "client/large", "latest")
    async with client_of(plain_registry.url) as client:
        sink = Memory()
        await client.blob("client/large", Descriptor("", layer.digest, layer.size), ANONYMOUS, sink)
    assert Digest.of(bytes(sink.content)) == layer.digest
    assert sink.writes <= layer.size // (256 * 1024) + 1  # batches, not network packets
