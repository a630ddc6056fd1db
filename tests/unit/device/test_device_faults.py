"""A device refuses every delta of which one thing is spoiled."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from obdelta.device.http import Dropped, ServerFault
from obdelta.errors import (
    BadReference,
    DigestMismatch,
    LayerInvalid,
    ManifestInvalid,
    ObdeltaError,
    SizeMismatch,
    StreamInvalid,
)
from obdelta.oci import Digest
from tests.support.fake_delta import (
    BASE,
    EMPTY,
    TAG,
    TARGET,
    Fake,
    Made,
    Reply,
    cut,
    delta_tar,
    device,
    fake,
    made,
    publish,
)
from tests.support.images import TARGET_REPOSITORY

__all__ = ["fake", "made"]


def spoiled(stream: bytes) -> bytes:
    """Changes a literal byte: the stream is valid and makes another target."""
    return stream[:-10] + bytes([stream[-10] ^ 1]) + stream[-9:]


def other_config(made: Made) -> bytes:
    return json.dumps(json.loads(made.pair.target.config) | {"author": "somebody"}).encode()


def with_streams(fake: Fake, made: Made, streams: list[bytes]) -> None:
    publish(fake, Made(made.pair, made.base, streams, made.shared))


WRONG: dict[str, tuple[type[ObdeltaError], Callable[[Fake, Made], None]]] = {
    "base": (DigestMismatch, lambda fake, made: publish(fake, made, base_id="sha256:" + "0" * 64)),
    "no base": (
        DigestMismatch,
        lambda fake, made: publish(fake, made, labels={"io.resin.delta.config": "{}"}),
    ),
    "no config": (
        ManifestInvalid,
        lambda fake, made: publish(
            fake, made, labels={"io.resin.delta.base": str(made.base.image_id)}
        ),
    ),
    "target config": (
        DigestMismatch,
        lambda fake, made: publish(fake, made, config=other_config(made)),
    ),
    "not the target": (DigestMismatch, lambda fake, made: publish(fake, made, labels={})),
    "literal": (
        DigestMismatch,
        lambda fake, made: with_streams(fake, made, [spoiled(made.streams[0]), *made.streams[1:]]),
    ),
    "order": (DigestMismatch, lambda fake, made: with_streams(fake, made, made.streams[::-1])),
    "short stream": (
        StreamInvalid,
        lambda fake, made: with_streams(fake, made, [s[:-1] for s in made.streams]),
    ),
    "not a stream": (
        StreamInvalid,
        lambda fake, made: with_streams(fake, made, [b"nonsense" for _ in made.streams]),
    ),
    "layer count": (
        ManifestInvalid,
        lambda fake, made: publish(
            fake,
            made,
            layers=[EMPTY] * made.shared,
            diff_ids=[str(Digest.of(bytes(1024)))] * made.shared,
        ),
    ),
    "diff_id": (
        DigestMismatch,
        lambda fake, made: publish(
            fake,
            made,
            diff_ids=[str(Digest.of(bytes(1024)))] * made.shared
            + ["sha256:" + "0" * 64] * len(made.streams),
        ),
    ),
    "shared layer": (
        DigestMismatch,
        lambda fake, made: publish(
            fake,
            made,
            layers=[
                gzip.compress(delta_tar(stream))
                for stream in [made.streams[0]] * made.shared + made.streams
            ],
            diff_ids=[
                str(Digest.of(delta_tar(stream)))
                for stream in [made.streams[0]] * made.shared + made.streams
            ],
        ),
    ),
    "not a tar": (
        LayerInvalid,
        lambda fake, made: publish(
            fake,
            made,
            layers=[EMPTY] * made.shared + [gzip.compress(b"x" * 2048)] * len(made.streams),
            diff_ids=[str(Digest.of(bytes(1024)))] * made.shared
            + [str(Digest.of(b"x" * 2048))] * len(made.streams),
        ),
    ),
    "truncated gzip": (
        LayerInvalid,
        lambda fake, made: publish(
            fake,
            made,
            layers=[EMPTY] * made.shared
            + [gzip.compress(delta_tar(stream))[:-9] for stream in made.streams],
        ),
    ),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_a_delta_to_another_target_is_refused(
    fake: Fake, made: Made, tmp_path: Path, wrong: str
) -> None:
    error, spoil = WRONG[wrong]
    spoil(fake, made)
    with pytest.raises(error) as failure:
        device(fake).update(made.base, BASE, TARGET, tmp_path)
    assert "\n" not in str(failure.value)
    assert not list(tmp_path.iterdir())


def on(part: str, reply: Reply, method: str = "GET") -> Callable[[str, str, Reply], Reply]:
    return lambda sent, path, right: reply if part in path and sent == method else right


def add(part: str, **headers: str) -> Callable[[str, str, Reply], Reply]:
    def change(method: str, path: str, reply: Reply) -> Reply:
        if part in path:
            reply.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        return reply

    return change


def flip(method: str, path: str, reply: Reply) -> Reply:
    if "/blobs/" in path:
        reply.body = bytes([reply.body[0] ^ 1]) + reply.body[1:]
    return reply


def longer(method: str, path: str, reply: Reply) -> Reply:
    if "/blobs/" in path:
        reply.body += b"x"
    return reply


NOT_HERE = b'{"errors": [{"message": "not\\nhere"}]}'
FAULTS: dict[str, tuple[type[ObdeltaError], str, Callable[[str, str, Reply], Reply]]] = {
    "api 401": (ServerFault, "answered 401", on("/api", Reply(401))),
    "api 404": (
        ServerFault,
        "answered 404: no such thing",
        on("/api", Reply(404, b"no\nsuch thing")),
    ),
    "api not json": (ServerFault, "not with a JSON object", on("/api", Reply(200, b"{"))),
    "api no name": (ServerFault, "not with a JSON object", on("/api", Reply(200, b"[]"))),
    "api bad name": (
        BadReference,
        "bad image reference",
        on("/api", Reply(200, b'{"name": "../x"}')),
    ),
    "api redirect": (
        ServerFault,
        "answered 302",
        on("/api", Reply(302, headers={"Location": "/x"})),
    ),
    "api huge": (ServerFault, "more than 65536 bytes", on("/api", Reply(200, b" " * 100_000))),
    "ping 500": (ServerFault, "answered 500", on("/v2/", Reply(500))),
    "ping basic": (
        ServerFault,
        "answered 401",
        on("/v2/", Reply(401, headers={"WWW-Authenticate": "Basic realm=x"})),
    ),
    "manifest 404": (ServerFault, "answered 404", on("/manifests/", Reply(404), "HEAD")),
    "manifest 404 with a reason": (
        ServerFault,
        "answered 404: not here",
        on("/manifests/", Reply(404, NOT_HERE)),
    ),
    "no digest": (
        ServerFault,
        "lacks Docker-Content-Digest",
        add("/manifests/", Docker_Content_Digest=""),
    ),
    "no type": (ServerFault, "lacks Content-Type", add("/manifests/", Content_Type="")),
    "other manifest": (DigestMismatch, "manifest has digest", on("/manifests/", Reply(200, b"{}"))),
    "flipped blob": (DigestMismatch, "has digest", flip),
    "longer blob": (SizeMismatch, "bytes, expected", longer),
    "blob 404": (ServerFault, "answered 404", on("/blobs/", Reply(404))),
    "blob endless redirect": (
        ServerFault,
        "more than 5 times",
        on("/blobs/", Reply(307, headers={"Location": "/blobs/x"})),
    ),
    "blob nowhere": (ServerFault, "without a Location", on("/blobs/", Reply(307))),
    "blob to a file": (
        ServerFault,
        "away from HTTP",
        on("/blobs/", Reply(307, headers={"Location": "file:///etc/passwd"})),
    ),
    "config cut": (
        Dropped,
        "ended after 5 of",
        lambda _m, path, reply: cut(path, reply, "/blobs/", 5),
    ),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_faults_are_reported_in_one_line(
    fake: Fake, made: Made, tmp_path: Path, fault: str
) -> None:
    error, message, fake.change = FAULTS[fault]
    with pytest.raises(error, match=message) as failure:
        device(fake, "SECRET").update(made.base, BASE, TARGET, tmp_path, deadline=0)
    assert "\n" not in str(failure.value)
    assert "SECRET" not in str(failure.value)
    assert not list(tmp_path.iterdir())


def test_an_endlessly_cut_layer_ends_in_an_error(fake: Fake, made: Made, tmp_path: Path) -> None:
    layers = {
        layer["digest"]
        for layer in json.loads(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])["layers"]
    }
    fake.change = lambda _method, path, reply: (
        cut(path, reply, "/blobs/", 0) if path[-71:] in layers else reply
    )
    with pytest.raises(Dropped):
        device(fake).update(made.base, BASE, TARGET, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_ignores_ranges_is_reported(fake: Fake, made: Made, tmp_path: Path) -> None:
    layers = {
        layer["digest"]
        for layer in json.loads(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])["layers"]
    }

    def change(method: str, path: str, reply: Reply) -> Reply:
        if path[-71:] not in layers:
            return reply
        return Reply(200, fake.blobs[path[-71:]], cut=10)

    fake.change = change
    with pytest.raises(ServerFault, match="answered 200"):
        device(fake).update(made.base, BASE, TARGET, tmp_path)


def test_secrets_are_in_no_repr(fake: Fake) -> None:
    assert "SECRET" not in repr(device(fake, "SECRET"))
