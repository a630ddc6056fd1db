"""The device of `obdelta check` and of many tests: it must be as strict as an engine, or its
verification means nothing.

The server is a small double that serves a correct delta.
"""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest

from obdelta.delta.layer_tar import layer_copies
from obdelta.device.http import ServerFault
from obdelta.oci import Digest
from tests.support.fake_delta import (
    BASE,
    EMPTY,
    TAG,
    TARGET,
    Fake,
    Made,
    Reply,
    delta_tar,
    device,
    fake,
    made,
    publish,
    serving,
)
from tests.support.images import TARGET_REPOSITORY

__all__ = ["fake", "made"]


def test_a_good_delta_is_verified_and_counted(fake: Fake, made: Made, tmp_path: Path) -> None:
    update = device(fake).update(made.base, BASE, TARGET, tmp_path)
    assert update.is_delta
    assert update.image_id == made.pair.target.image_id
    manifest = json.loads(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])
    # An engine has the shared layers, and requests none of them.
    sizes = (
        sum(layer["size"] for layer in manifest["layers"][made.shared :])
        + manifest["config"]["size"]
    )
    assert update.pulled_bytes == sizes + len(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])
    assert not list(tmp_path.iterdir())


def test_a_delta_with_copies_of_the_shared_layers_is_verified(
    fake: Fake, made: Made, tmp_path: Path
) -> None:
    copies = layer_copies((layer.diff_id, layer.size) for layer in made.base.layers[: made.shared])
    assert copies
    deltas = [delta_tar(stream) for stream in made.streams]
    publish(
        fake,
        made,
        layers=[copy.content for copy in copies] + [gzip.compress(tar, 1) for tar in deltas],
        diff_ids=[str(copy.layer.diff_id) for copy in copies]
        + [str(Digest.of(tar)) for tar in deltas],
    )
    update = device(fake).update(made.base, BASE, TARGET, tmp_path)
    assert update.is_delta and update.image_id == made.pair.target.image_id


def test_it_requests_unescaped_names_and_pulls_in_the_order_of_an_engine(
    fake: Fake, made: Made, tmp_path: Path
) -> None:
    names = f"{BASE}@{made.pair.base.digest}", f"{TARGET}:latest"
    device(fake).update(made.base, *names, tmp_path)
    api, *_ = fake.log
    assert api[1] == f"/api/v3/delta?src={names[0]}&dest={names[1]}"
    assert api[2]["user-agent"].startswith("Supervisor/")
    sent = [(method, path) for method, path, _ in fake.log]
    digest = Digest.of(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])
    at = sent.index(("HEAD", f"/v2/{TARGET_REPOSITORY}/manifests/{TAG}"))
    assert sent[1] == ("GET", "/v2/")
    assert sent.count(("GET", "/v2/")) == 1
    assert sent[at + 1] == ("GET", f"/v2/{TARGET_REPOSITORY}/manifests/{digest}")
    manifest = json.loads(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])
    blobs = [manifest["config"], *manifest["layers"]]
    assert sent[at + 2 :] == [
        ("GET", f"/v2/{TARGET_REPOSITORY}/blobs/{blob['digest']}") for blob in blobs
    ]


def test_a_base_is_loaded_from_the_registry(fake: Fake, made: Made, tmp_path: Path) -> None:
    from obdelta.oci import Reference

    base = device(fake).load_base(Reference.parse(BASE), tmp_path)
    assert (base.image_id, base.diff_ids) == (made.base.image_id, made.base.diff_ids)
    assert [layer.path.read_bytes() for layer in base.layers] == [
        layer.path.read_bytes() for layer in made.base.layers
    ]


def test_a_full_pull_is_verified_too(fake: Fake, made: Made, tmp_path: Path) -> None:
    fake.name = TARGET
    update = device(fake).update(made.base, BASE, TARGET, tmp_path)
    assert not update.is_delta
    assert update.pulled_bytes == update.full_bytes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [502, 504])
def test_it_retries_while_the_delta_is_being_built(
    fake: Fake, made: Made, tmp_path: Path, status: int
) -> None:
    left = [3]

    def change(method: str, path: str, reply: Reply) -> Reply:
        if path.startswith("/api") and left[0]:
            left[0] -= 1
            return Reply(status)
        return reply

    fake.change = change
    assert device(fake).update(made.base, BASE, TARGET, tmp_path).requests == 4


def test_it_stops_retrying_at_its_deadline(fake: Fake, made: Made, tmp_path: Path) -> None:
    times = iter(range(0, 100, 10))
    fake.change = lambda _method, path, reply: Reply(504) if path.startswith("/api") else reply
    with pytest.raises(ServerFault, match="answered 504"):
        device(fake, clock=lambda: float(next(times))).update(
            made.base, BASE, TARGET, tmp_path, deadline=30
        )


@pytest.mark.parametrize("kind", ["bzip2", "plain", "members"])
def test_layers_in_every_form_that_an_engine_reads(
    fake: Fake, made: Made, tmp_path: Path, kind: str
) -> None:
    def squeeze(tar: bytes) -> bytes:
        half = len(tar) // 2
        members = gzip.compress(tar[:half]) + gzip.compress(tar[half:])
        return {"bzip2": bz2.compress(tar), "plain": tar, "members": members}[kind]

    publish(
        fake,
        made,
        layers=[EMPTY] * made.shared + [squeeze(delta_tar(stream)) for stream in made.streams],
    )
    assert device(fake).update(made.base, BASE, TARGET, tmp_path).is_delta


def test_a_dropped_layer_is_resumed(fake: Fake, made: Made, tmp_path: Path) -> None:
    manifest = json.loads(fake.manifests[f"{TARGET_REPOSITORY}/{TAG}"])
    layer = max(manifest["layers"], key=lambda each: int(each["size"]))
    drops = iter([1000, 5000, 1])

    def change(method: str, path: str, reply: Reply) -> Reply:
        if path.endswith(layer["digest"]):
            reply.cut = next(drops, None)
        return reply

    fake.change = change
    assert device(fake).update(made.base, BASE, TARGET, tmp_path).is_delta
    sent = [headers.get("range") for _, path, headers in fake.log if path.endswith(layer["digest"])]
    assert sent == [None, "bytes=1000-", "bytes=6000-", "bytes=6001-"]


def test_the_token_goes_where_the_ping_asks_for_it(fake: Fake, made: Made, tmp_path: Path) -> None:
    device(fake, "T").update(made.base, BASE, TARGET, tmp_path)
    for _, path, headers in fake.log:
        assert ("authorization" in headers) == path.startswith("/api/")
    fake.log.clear()
    challenge = {"WWW-Authenticate": 'Bearer realm="https://api.example.com",service="x"'}
    fake.change = lambda _method, path, reply: (
        Reply(401, headers=challenge) if path == "/v2/" else reply
    )
    device(fake, "T").update(made.base, BASE, TARGET, tmp_path)
    for _, path, headers in fake.log:
        assert headers.get("authorization") == (None if path == "/v2/" else "Bearer T")


def test_a_redirect_is_followed_without_the_token(fake: Fake, made: Made, tmp_path: Path) -> None:
    storage = Fake(blobs=fake.blobs)
    with serving(storage):

        def change(method: str, path: str, reply: Reply) -> Reply:
            if path == "/v2/":
                return Reply(401, headers={"WWW-Authenticate": "Bearer realm=x"})
            return (
                Reply(307, headers={"Location": storage.url + path}) if "/blobs/" in path else reply
            )

        fake.change = change
        assert device(fake, "T").update(made.base, BASE, TARGET, tmp_path).is_delta
    assert storage.log
    assert all("authorization" not in headers for _, _, headers in storage.log)
