"""Pushes into Debian's real docker-registry: which blobs are sent, which are not sent again, and
what happens after a cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.web.http_headers import Headers

from bench.images import Image, file, make_image, make_layer
from obdelta.errors import BadRequest, BlobUnknown, Denied, SizeMismatch, UpstreamUnavailable
from obdelta.oci import Descriptor, Digest, Manifest, parse_manifest
from obdelta.registry import Credentials, OwnCredentials
from obdelta.registry.upload import PushResult
from tests.support.clients import Memory, client_of
from tests.support.cutting import cutting_proxy
from tests.support.hostile import Answer, Connection, hostile_upstream, response
from tests.support.registry import (
    BUILDER_TOKEN,
    RunningRegistry,
    plain_registry,
    running_registry,
    token_registry,
)

__all__ = ["plain_registry", "token_registry"]

ANONYMOUS = Credentials.anonymous(exchange=True)
BUILDER = OwnCredentials.builder(BUILDER_TOKEN).own
Places = Callable[[Digest], Path | None]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image with two layers of noise (incompressible), 700 KB and 2 KB, and one that occurs
    twice.
    """
    folder = tmp_path_factory.mktemp("image")
    source = random.Random(7)
    layers = [
        make_layer([file(f"noise-{size}", source.randbytes(size))], folder / "blobs")
        for size in (700_000, 2_000)
    ]
    return make_image([*layers, layers[1]], folder / "image")


def manifest_of(image: Image) -> Manifest:
    manifest = parse_manifest(image.manifest, image.media_type)
    assert isinstance(manifest, Manifest)
    return manifest


@pytest.fixture
def places(image: Image, tmp_path: Path) -> Places:
    config = tmp_path / "config"
    config.write_bytes(image.config)
    known = {image.image_id: config, **{layer.digest: layer.path for layer in image.layers}}
    return lambda digest: known.get(Digest(digest.hex))


@pytest_twisted.ensureDeferred
async def test_each_blob_is_sent_once_with_its_length(
    image: Image, places: Places, plain_registry: RunningRegistry
) -> None:
    manifest = manifest_of(image)
    reported: list[int] = []
    async with cutting_proxy(plain_registry.url) as proxy, client_of(proxy.url) as client:
        push = client.pusher().push
        done = await push(
            "push/first", "delta-1", manifest, places, ANONYMOUS, progress=reported.append
        )
        sizes = [image.layers[0].size, image.layers[1].size, len(image.config)]
        assert done == PushResult(sent=3, sent_bytes=sum(sizes)) and reported[-1] == sum(sizes)
        assert (
            "transfer-encoding" not in proxy.heads
            and f"content-length: {image.layers[0].size}\r" in proxy.heads
        )
        assert await client.manifest("push/first", "delta-1", ANONYMOUS) == manifest
        for layer, blob in zip(manifest.layers, image.layers, strict=True):
            sink = Memory()
            await client.blob("push/first", layer, ANONYMOUS, sink)
            assert bytes(sink.content) == blob.path.read_bytes()
        # Again, under another tag: only the manifest is sent, and the files are not needed.
        assert await push(
            "push/first", "delta-2", manifest, lambda _: None, ANONYMOUS
        ) == PushResult(present=3)
        assert await client.manifest("push/first", "delta-2", ANONYMOUS) == manifest


@pytest_twisted.ensureDeferred
async def test_blobs_are_mounted_from_other_repositories(
    image: Image, places: Places, plain_registry: RunningRegistry
) -> None:
    manifest = manifest_of(image)
    async with client_of(plain_registry.url) as client:
        push = client.pusher().push
        await push("push/origin", "t", manifest, places, ANONYMOUS)
        there = ["push/no-such", "push/origin"]
        assert await push(
            "push/mounted", "t", manifest, lambda _: None, ANONYMOUS, mount_from=there
        ) == PushResult(mounted=3)
        assert await client.manifest("push/mounted", "t", ANONYMOUS) == manifest
        # If the registry does not have them, they are sent.
        done = await push(
            "push/sent", "t", manifest, places, ANONYMOUS, mount_from=["push/no-such"]
        )
        assert (done.sent, done.mounted) == (3, 0)


@pytest_twisted.ensureDeferred
async def test_the_builders_token_may_push(
    image: Image, places: Places, token_registry: RunningRegistry
) -> None:
    manifest, tokens = manifest_of(image), token_registry.tokens
    assert tokens is not None
    tokens.requests.clear()
    async with client_of(token_registry.url) as client:
        await client.pusher().push("v2/pushed", "t", manifest, places, BUILDER)
        assert {request.user for request in tokens.requests} == {"builder"}
        assert {tuple(request.scopes) for request in tokens.requests} == {
            ("repository:v2/pushed:pull,push",)
        }
        mounted = await client.pusher().push(
            "v2/other", "t", manifest, places, BUILDER, mount_from=["v2/pushed"]
        )
        assert mounted.mounted == 3
        both = ["repository:v2/other:pull,push", "repository:v2/pushed:pull"]
        assert both in [request.scopes for request in tokens.requests]
        assert await client.manifest("v2/other", "t", BUILDER) == manifest


@pytest_twisted.ensureDeferred
async def test_where_a_mount_is_refused_blobs_are_sent(
    image: Image, places: Places, token_registry: RunningRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, tokens = manifest_of(image), token_registry.tokens
    assert tokens is not None
    async with client_of(token_registry.url) as client:
        await client.pusher().push("v2/private", "t", manifest, places, BUILDER)
    granted = tokens.answer

    def answer(authorization: str | None, query: str) -> tuple[int, dict[str, Any]]:
        # The API's answer for a repository that it does not know any more: it grants nothing
        # there.
        return granted(authorization, query.replace("v2%2Fprivate%3Apull", "v2%2Fprivate%3A"))

    monkeypatch.setattr(tokens, "answer", answer)
    async with client_of(token_registry.url) as client:
        done = await client.pusher().push(
            "v2/open", "t", manifest, places, BUILDER, mount_from=["v2/private"]
        )
        assert (done.sent, done.mounted) == (3, 0)
        assert await client.manifest("v2/open", "t", BUILDER) == manifest


@pytest_twisted.ensureDeferred
async def test_a_registry_that_refuses_uploads(
    image: Image, places: Places, tmp_path: Path
) -> None:
    with running_registry(tmp_path / "registry", readonly=True) as registry:
        async with client_of(registry.url) as client:
            with pytest.raises(UpstreamUnavailable, match=r"answered 405"):
                await client.pusher().push("push/full", "t", manifest_of(image), places, ANONYMOUS)


def before_the_body(answer: Answer) -> Answer:
    """Answers before the body; later bytes are no request."""

    def reply(connection: Connection) -> None:
        connection.dataReceived = lambda data: None  # type: ignore[method-assign]
        connection._head = b""
        answer(connection)

    return reply


@pytest_twisted.ensureDeferred
async def test_a_token_that_ends_in_the_middle_of_a_push_is_renewed(
    image: Image, places: Places
) -> None:
    manifest, blobs = manifest_of(image), "/v2/push/app/blobs"
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        realm = f'Bearer realm="{upstream.url}/token",service="s"'
        upstream.script("/v2/", response(401, www_authenticate=realm))
        upstream.script(
            "/token", *(response(200, b'{"token": "%s"}' % name) for name in (b"first", b"second"))
        )
        first = [response(401, www_authenticate=realm)]
        for descriptor in (manifest.config, manifest.layers[0]):
            there = response(200, content_length=str(descriptor.size))
            upstream.script(f"{blobs}/{descriptor.digest}", *first, there)
            first = []
        upload = f"{blobs}/uploads/1"
        upstream.script(f"{blobs}/uploads/", response(202, location=upload))
        ended = response(401, www_authenticate=realm, connection="close")
        upstream.script(
            upload, before_the_body(ended), before_the_body(response(201, connection="close"))
        )
        upstream.script("/v2/push/app/manifests/t", response(201))
        assert (await client.pusher().push("push/app", "t", manifest, places, BUILDER)).sent == 1
        assert [one.header("authorization") for one in upstream.requests_to(upload)] == [
            "Bearer first",
            "Bearer second",
        ]


@pytest.mark.parametrize("credentials", [ANONYMOUS, OwnCredentials.builder("wrong").own])
@pytest_twisted.ensureDeferred
async def test_a_push_without_access_is_denied(
    credentials: Credentials, image: Image, places: Places, token_registry: RunningRegistry
) -> None:
    async with client_of(token_registry.url) as client:
        with pytest.raises(
            Denied, match=r"push to v2/forbidden|refuses the configured credentials of builder"
        ):
            await client.pusher().push("v2/forbidden", "t", manifest_of(image), places, credentials)


@pytest_twisted.ensureDeferred
async def test_an_upload_that_breaks_off_starts_again(
    image: Image, places: Places, plain_registry: RunningRegistry
) -> None:
    manifest = manifest_of(image)
    async with cutting_proxy(plain_registry.url) as proxy, client_of(proxy.url) as client:
        proxy.cut_after, proxy.cuts = 300_000, 2
        done = await client.pusher().push("push/cut", "t", manifest, places, ANONYMOUS)
        assert (done.sent, proxy.cuts) == (3, 0)
        sink = Memory()
        await client.blob("push/cut", manifest.layers[0], ANONYMOUS, sink)
        assert bytes(sink.content) == image.layers[0].path.read_bytes()


@pytest_twisted.ensureDeferred
async def test_a_push_fails_after_several_attempts_and_tags_nothing(
    image: Image, places: Places, plain_registry: RunningRegistry
) -> None:
    async with cutting_proxy(plain_registry.url) as proxy, client_of(proxy.url) as client:
        proxy.cut_after, proxy.cuts = 300_000, 1000
        with pytest.raises(UpstreamUnavailable):
            await client.pusher().push("push/given-up", "t", manifest_of(image), places, ANONYMOUS)
        proxy.cuts = 0
        answer = await client._session.send(
            b"GET", "/v2/push/given-up/manifests/t", Headers(), ANONYMOUS, "push/given-up"
        )
        await answer.response.discard()
        assert answer.response.status == 404


@pytest_twisted.ensureDeferred
async def test_wrong_local_blobs_are_not_pushed(
    image: Image, places: Places, tmp_path: Path, plain_registry: RunningRegistry
) -> None:
    manifest = manifest_of(image)
    big = manifest.layers[0]
    short, altered = tmp_path / "short", tmp_path / "altered"
    short.write_bytes(b"short")
    altered.write_bytes(image.layers[0].path.read_bytes()[:-1] + b"!")
    async with client_of(plain_registry.url) as client:
        push = client.pusher().push
        for path, error in ((None, BlobUnknown), (short, SizeMismatch), (altered, BadRequest)):
            with pytest.raises(error):
                wrong: Places = lambda digest, path=path: (  # noqa: E731
                    path if digest == big.digest else places(digest)
                )  # type: ignore[misc]
                await push("push/wrong", "t", manifest, wrong, ANONYMOUS)
        assert not await client.pusher().has_blob("push/wrong", big, ANONYMOUS)
        shorter = Descriptor(big.media_type, big.digest, big.size - 1)
        await push("push/wrong", "t", manifest, places, ANONYMOUS)
        assert await client.pusher().has_blob("push/wrong", big, ANONYMOUS)
        assert not await client.pusher().has_blob("push/wrong", shorter, ANONYMOUS)


@pytest.mark.parametrize(
    "location", ["", "https://elsewhere.example/upload/1", "/v2/other/blobs/uploads/1", "http://["]
)
@pytest_twisted.ensureDeferred
async def test_uploads_are_not_redirected_to_other_hosts(
    location: str, image: Image, places: Places
) -> None:
    uploads = "/v2/push/app/blobs/uploads/"
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(uploads, response(202, location=location))
        with pytest.raises(UpstreamUnavailable, match="another host"):
            await client.pusher().push("push/app", "t", manifest_of(image), places, ANONYMOUS)
        assert not [request for request in upstream.seen if request.method == "PUT"]


@pytest_twisted.ensureDeferred
async def test_a_registry_that_stores_another_manifest_is_detected(
    image: Image, places: Places
) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        for descriptor in (manifest_of(image).config, *manifest_of(image).layers):
            upstream.script(
                f"/v2/push/app/blobs/{descriptor.digest}",
                response(200, content_length=str(descriptor.size)),
            )
        upstream.script(
            "/v2/push/app/manifests/t", response(201, docker_content_digest="sha256:" + "0" * 64)
        )
        with pytest.raises(Exception, match="has digest sha256:0000"):
            await client.pusher().push("push/app", "t", manifest_of(image), places, ANONYMOUS)
