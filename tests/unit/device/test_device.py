"""The device of `obdelta check` and of many tests: it must be as strict as an engine, or its
verification means nothing.

The server is a small double that serves a correct delta, and then spoils one thing at a time.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from obdelta.delta.build import LayerFile
from obdelta.delta.layer_tar import layer_copies
from obdelta.device.http import Dropped, Http, ServerFault
from obdelta.device.pull import Engine
from obdelta.device.update import Base, Device
from obdelta.errors import (
    BadReference,
    DigestMismatch,
    LayerInvalid,
    ManifestInvalid,
    ObdeltaError,
    SizeMismatch,
    StreamInvalid,
)
from obdelta.oci import Digest, common_prefix
from obdelta.oci.manifest import DOCKER_MANIFEST
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair

TAG = "delta-0123456789abcdef"
HOST = "registry.example.com"
BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"
EMPTY = gzip.compress(bytes(1024), mtime=0)


@dataclass
class Reply:
    """The server's answer to one request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """The connection is closed after this number of the body's bytes."""


@dataclass
class Fake:
    """A registry and delta server. ``change`` may replace the right answer by another one."""

    url: str = ""
    name: str = f"{HOST}/{TARGET_REPOSITORY}:{TAG}"
    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    change: Callable[[str, str, Reply], Reply] = lambda _method, _path, reply: reply

    def put_manifest(self, repository: str, tag: str, raw: bytes) -> None:
        self.manifests[f"{repository}/{tag}"] = self.manifests[f"{repository}/{Digest.of(raw)}"] = (
            raw
        )

    def put_blob(self, content: bytes) -> dict[str, Any]:
        self.blobs[str(Digest.of(content))] = content
        return {
            "mediaType": "application/octet-stream",
            "size": len(content),
            "digest": str(Digest.of(content)),
        }

    def reply(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        self.log.append((method, path, headers))
        if path.startswith("/api/v3/delta?"):
            return Reply(body=json.dumps({"name": self.name}).encode())
        if path == "/v2/":
            return Reply()
        kind, _, name = path.rpartition("/")
        if kind.endswith("/manifests"):
            raw = self.manifests.get(
                f"{kind.removeprefix('/v2/').removesuffix('/manifests')}/{name}"
            )
            if raw is None:
                return Reply(
                    404, json.dumps({"errors": [{"code": "X", "message": "not\nhere"}]}).encode()
                )
            return Reply(
                200,
                raw,
                {"Content-Type": DOCKER_MANIFEST, "Docker-Content-Digest": str(Digest.of(raw))},
            )
        content = self.blobs.get(name)
        if content is None:
            return Reply(404)
        if wanted := headers.get("range"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return Reply(206, content[start:], part)
        return Reply(200, content)


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        served: ClassVar[Fake] = fake

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = fake.change(
                self.command, self.path, fake.reply(self.command, self.path, headers)
            )
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(reply.body[: reply.cut])
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            fake.url = f"http://127.0.0.1:{server.server_port}"
            yield fake
        finally:
            server.shutdown()
            thread.join()


def delta_tar(stream: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("delta")
        info.size, info.mode = len(stream), 0o600
        tar.addfile(info, io.BytesIO(stream))
    return out.getvalue()


@dataclass
class Made:
    """A pair, its base on the device's disk, and correct delta streams (rdiff's) of the layers
    after the shared ones.
    """

    pair: Pair
    base: Base
    streams: list[bytes]
    shared: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    pair = make_pair(folder / "pair", size=128 * 1024)
    files = []
    for number, layer in enumerate(pair.base.layers):
        path = layer.write_tar(folder / f"{number}.tar")
        files.append(LayerFile(layer.diff_id, path, layer.tar_size))
    concatenated, signature = folder / "base", folder / "signature"
    concatenated.write_bytes(b"".join(file.path.read_bytes() for file in files))
    subprocess.run(["rdiff", "-b", "512", "signature", concatenated, signature], check=True)
    shared = common_prefix(pair.base.diff_ids, pair.target.diff_ids)
    streams = []
    for number, layer in enumerate(pair.target.layers[shared:]):
        tar, stream = layer.write_tar(folder / f"target-{number}"), folder / f"stream-{number}"
        subprocess.run(["rdiff", "delta", signature, tar, stream], check=True)
        streams.append(stream.read_bytes())
    return Made(pair, Base(pair.base.image_id, tuple(files)), streams, shared)


@pytest.fixture
def fake(made: Made) -> Iterator[Fake]:
    fake = Fake()
    for image, repository in (
        (made.pair.base, BASE_REPOSITORY),
        (made.pair.target, TARGET_REPOSITORY),
    ):
        fake.put_manifest(repository, "latest", image.manifest)
        fake.put_blob(image.config)
        for layer in image.layers:
            fake.put_blob(layer.path.read_bytes())
    publish(fake, made)
    with serving(fake):
        yield fake


def publish(
    fake: Fake,
    made: Made,
    *,
    base_id: str | None = None,
    config: bytes | None = None,
    layers: list[bytes] | None = None,
    diff_ids: list[str] | None = None,
    labels: dict[str, str] | None = None,
) -> None:
    """Publishes the correct delta image under its tag, or one with other parts."""
    tars = [bytes(1024)] * made.shared + [delta_tar(stream) for stream in made.streams]
    if layers is None:
        layers = [EMPTY] * made.shared + [gzip.compress(tar, 1) for tar in tars[made.shared :]]
    target = (config or made.pair.target.config).decode()
    if labels is None:
        labels = {
            "io.resin.delta.base": base_id or str(made.base.image_id),
            "io.resin.delta.config": target,
        }
    value = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {
            "type": "layers",
            "diff_ids": diff_ids or [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": fake.put_blob(json.dumps(value).encode()),
        "layers": [fake.put_blob(layer) for layer in layers],
    }
    fake.put_manifest(TARGET_REPOSITORY, TAG, json.dumps(manifest).encode())


def device(fake: Fake, token: str | None = None, **options: Any) -> Device:
    http = Http(timeout=10)
    return Device(
        http, Engine(http, token, fake.url), fake.url, token, sleep=lambda _seconds: None, **options
    )


# -- what goes well ----------------------------------------------------------------------------


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


# -- what must never count as verified ---------------------------------------------------------


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


def cut(path: str, reply: Reply, part: str, after: int) -> Reply:
    if part in path:
        reply.cut = after
    return reply


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
