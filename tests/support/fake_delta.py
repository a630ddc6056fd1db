"""A small registry and delta server: it serves a correct delta, and what a test changes."""

from __future__ import annotations

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
from typing import Any, ClassVar

import pytest

from obdelta.delta.build import LayerFile
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Base, Device
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


def cut(path: str, reply: Reply, part: str, after: int) -> Reply:
    if part in path:
        reply.cut = after
    return reply
