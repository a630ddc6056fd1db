"""A test double of a balena-engine's HTTP API over a unix socket, written by hand after its
documented behaviour: Debian has no package of one. What it shares with Docker (pull, save, remove,
credentials, errors) is also tested on a real ``dockerd`` (``tests/unit/builds/test_engine.py``).

It keeps images in a folder, pulls them from a real registry as the device of ``obdelta check``
does, and makes deltas with Debian's rdiff (librsync itself, with the engine's block and hash
sizes).

    with running_engine(folder) as engine:
        engine.url                        # for docker-host
        engine.images                     # IDs of the images that it has
        engine.say("delta", {"error": "…"})   # in the middle of the next answer's stream
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import socketserver
import ssl
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.delta.inflate import import_layer
from obdelta.device import Engine, Http
from obdelta.errors import ObdeltaError
from obdelta.oci import Reference, common_prefix, parse_config

EMPTY_TAR = bytes(1024)


@dataclass
class Kept:
    """An image that the engine has: its config's bytes and uncompressed layers, and its names."""

    config: bytes
    layers: list[Path]
    names: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        return "sha256:" + hashlib.sha256(self.config).hexdigest()


@dataclass
class EngineDouble:
    """``requests`` are method and path of each request that came, ``pulls`` the credentials that
    came with pulls.
    """

    folder: Path
    registry: str
    token: Any
    url: str
    kept: dict[str, Kept] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    pulls: list[dict[str, str]] = field(default_factory=list)
    saying: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    flip: bool = False
    """Whether a byte of every delta is wrong."""
    dies: bool = False
    """Whether it is dead after an answer that breaks off, until ``dead`` is made False."""
    dead: bool = False

    @property
    def images(self) -> list[str]:
        return sorted(self.kept)

    def say(self, what: str, message: dict[str, Any]) -> None:
        """``message`` comes in the middle of the next answer to ``pull`` or ``delta``, which ends
        with it.
        """
        self.saying[what] = message

    def find(self, name: str) -> Kept | None:
        found = [image for image in self.kept.values() if name in image.names or name == image.id]
        return found[0] if found else None

    def pull(self, name: str, credentials: dict[str, str]) -> Kept:
        """From the registry that it was made for, whatever host is named: one name leads there in
        tests.
        """
        self.pulls.append(credentials)
        http = Http(timeout=60)
        reference = Reference.parse(name)
        token = credentials.get("registrytoken") or self.token(credentials, reference.repository)
        engine = Engine(http, token=token, registry=self.registry)
        image = engine.pull(reference)
        layers = []
        for blob, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
            packed, path = (
                self.folder / f"{blob.digest.hex}.blob",
                self.folder / f"{diff_id.hex}.tar",
            )
            with self.lock:
                if not path.exists():
                    engine.download(image, blob, packed)
                    import_layer(packed, path, limit=1 << 30)
                    packed.unlink()
            layers.append(path)
        kept = self.kept.setdefault(str(image.config.image_id), Kept(image.config.raw, layers))
        kept.names.add(name)
        return kept

    def delta(self, base: Kept, target: Kept) -> Kept:
        """As the engine makes it: one signature over all of the base, one delta a layer behind the
        common ones.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            whole, signature = Path(work) / "base", Path(work) / "signature"
            with whole.open("wb") as out:
                for layer in base.layers:
                    out.write(layer.read_bytes())
            subprocess.run(
                ["rdiff", "-b", "512", "-S", "32", "signature", whole, signature], check=True
            )
            common = common_prefix(
                parse_config(base.config).diff_ids, parse_config(target.config).diff_ids
            )
            layers = []
            for number, layer in enumerate(target.layers):
                content = EMPTY_TAR
                if number >= common:
                    stream = Path(work) / "delta"
                    subprocess.run(["rdiff", "delta", signature, layer, stream], check=True)
                    content = self._packed(stream.read_bytes())
                    stream.unlink()
                path = self.folder / f"{hashlib.sha256(content).hexdigest()}.tar"
                path.write_bytes(content)
                layers.append(path)
        diff_ids = ["sha256:" + path.stem for path in layers]
        assert common == 0 or diff_ids[0] == str(EMPTY_LAYER_DIFF_ID)
        config = {
            "created": "2026-01-01T00:00:00Z",
            "config": {"Labels": {BASE_LABEL: base.id, CONFIG_LABEL: target.config.decode()}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        made = Kept(json.dumps(config).encode(), layers)
        return self.kept.setdefault(made.id, made)

    def _packed(self, stream: bytes) -> bytes:
        if self.flip and len(stream) > 1000:
            middle = len(stream) - 40
            stream = stream[:middle] + bytes([stream[middle] ^ 1]) + stream[middle + 1 :]
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            entry = tarfile.TarInfo("delta")
            entry.size, entry.mode = len(stream), 0o600
            tar.addfile(entry, io.BytesIO(stream))
        # Go's tar writer ends with two blocks; Python's fills a record.
        return out.getvalue()[: 512 + len(stream) + -len(stream) % 512 + 1024]


class _Answers(BaseHTTPRequestHandler):
    engine: EngineDouble
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is not its place."""

    def setup(self) -> None:
        super().setup()
        self.close_connection = True

    def handle_one_request(self) -> None:
        if not self.engine.dead:
            super().handle_one_request()

    def do_GET(self) -> None:
        path = self._path()
        if path == "/version":
            return self._json(
                {"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "v20.10.44"}
            )
        if path.startswith("/images/") and path.endswith("/json"):
            image = self._image(path.removeprefix("/images/").removesuffix("/json"))
            return None if image is None else self._json({"Id": image.id})
        if path.startswith("/images/") and path.endswith("/get"):
            image = self._image(path.removeprefix("/images/").removesuffix("/get"))
            return None if image is None else self._save(image)
        return self._json({"message": "page not found"}, 404)

    def do_POST(self) -> None:
        path, query = (
            self._path(),
            {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()},
        )
        if path == "/images/create":
            return self._pull(query)
        if path == "/images/delta":
            return self._delta(query)
        return self._json({"message": "page not found"}, 404)

    def do_DELETE(self) -> None:
        name = unquote(self._path().removeprefix("/images/"))
        image = self._image(name)
        if image is not None:
            image.names.discard(name)
            if not image.names:
                del self.engine.kept[image.id]
            self._json([{"Deleted": image.id}])

    def _path(self) -> str:
        path = urlsplit(self.path).path
        self.engine.requests.append(f"{self.command} {path}")
        head, _, rest = path.removeprefix("/").partition("/")
        return "/" + rest if head.startswith("v1.") else path

    def _image(self, name: str) -> Kept | None:
        image = self.engine.find(unquote(name))
        if image is None:
            self._json({"message": f"No such image: {name}"}, 404)
        return image

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def _message(self, **value: Any) -> None:
        self._chunk(json.dumps(value).encode() + b"\r\n")

    def _said(self, what: str) -> bool:
        """Whether the test wants the answer to end here."""
        message = self.engine.saying.pop(what, None)
        if message is None:
            return False
        if message:
            self._message(**message)
            self._chunk(b"")
        else:
            self.wfile.flush()
            self.engine.dead = self.engine.dies
            self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _pull(self, query: dict[str, str]) -> None:
        name = query["fromImage"]
        tag = query.get("tag")
        if tag:
            name += ("@" if tag.startswith("sha256:") else ":") + tag
        credentials = json.loads(
            base64.urlsafe_b64decode(self.headers.get("X-Registry-Auth") or "e30=")
        )
        self._begin("application/json")
        self._message(status="Pulling", id="x", progressDetail={"current": 1, "total": 2})
        if self._said("pull"):
            return
        try:
            self.engine.pull(name, credentials)
        except ObdeltaError as error:
            self._message(errorDetail={"message": str(error)}, error=str(error))
        else:
            self._message(status="Status: Downloaded newer image")
        self._chunk(b"")

    def _delta(self, query: dict[str, str]) -> None:
        base, target = self.engine.find(query["src"]), self.engine.find(query["dest"])
        if base is None or target is None:
            return self._json({"message": "no such image: No such image"}, 404)
        self._begin("application/json")
        self._message(
            status="Fingerprinting", id=query["src"], progressDetail={"current": 512, "total": 1024}
        )
        if self._said("delta"):
            return None
        made = self.engine.delta(base, target)
        self._message(status="Normal size: 1 MB, Delta size: 1 kB, 1000.00x improvement")
        self._message(status=f"Created delta: {made.id}")
        made.names.add(query["t"])
        self._message(status=f"Successfully tagged {query['t']}")
        self._chunk(b"")
        return None

    def _save(self, image: Kept) -> None:
        """As ``docker save`` of 20.10 has it: a folder a layer, links where a layer comes twice,
        the config, the manifest.
        """
        self._begin("application/x-tar")
        out, seen = io.BytesIO(), dict[Path, str]()
        manifest: dict[str, Any] = {
            "Config": f"{image.id.removeprefix('sha256:')}.json",
            "RepoTags": None,
            "Layers": [],
        }

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        with tarfile.open(fileobj=out, mode="w") as tar:
            for number, layer in enumerate(image.layers):
                folder = hashlib.sha256(f"{image.id} {number}".encode()).hexdigest()
                add(f"{folder}/VERSION", b"1.0")
                if layer in seen:
                    link = tarfile.TarInfo(f"{folder}/layer.tar")
                    link.type, link.linkname = tarfile.SYMTYPE, f"../{seen[layer]}/layer.tar"
                    tar.addfile(link)
                else:
                    add(f"{folder}/layer.tar", layer.read_bytes())
                    seen[layer] = folder
                manifest["Layers"].append(f"{folder}/layer.tar")
            add(manifest["Config"], image.config)
            add("manifest.json", json.dumps([manifest]).encode())
        content = out.getvalue()
        for at in range(0, len(content), 65536):
            self._chunk(content[at : at + 65536])
        self._chunk(b"")


class _Quiet(socketserver.ThreadingMixIn):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error of the engine's."""


class _UnixServer(_Quiet, socketserver.UnixStreamServer):
    pass


class _TcpServer(_Quiet, socketserver.TCPServer):
    pass


def no_token(_credentials: dict[str, str], _repository: str) -> str | None:
    """For a registry that is open to all."""
    return None


def builders_token(tokens: Any) -> Any:
    """What the engine gets at the realm (``tokens`` of ``tests.support.registry``) with user and
    password.
    """

    def token(credentials: dict[str, str], repository: str) -> str | None:
        if credentials.get("username") != "builder":
            return None
        basic = base64.b64encode(f"builder:{credentials['password']}".encode()).decode()
        status, body = tokens.answer(f"Basic {basic}", f"scope=repository:{repository}:pull")
        return str(body["token"]) if status == 200 else None

    return token


@contextmanager
def running_engine(
    registry: str, token: Any = no_token, *, tls: ssl.SSLContext | None = None
) -> Iterator[EngineDouble]:
    """Before ``registry`` (a URL). ``token(credentials, repository)`` exchanges what a pull came
    with.

    With ``tls`` it listens on a loopback port instead of a socket.
    """
    # Short: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        engine = EngineDouble(Path(folder), registry, token, f"unix://{folder}/engine.sock")

        class Answers(_Answers):
            pass

        Answers.engine = engine
        server: socketserver.BaseServer
        if tls is None:
            server = _UnixServer(f"{folder}/engine.sock", Answers)
        else:
            tcp = server = _TcpServer(("127.0.0.1", 0), Answers)
            engine.url = f"tcp://localhost:{tcp.server_address[1]}"
            tcp.socket = tls.wrap_socket(tcp.socket, server_side=True)
        with server:
            thread = threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
            )
            thread.start()
            try:
                yield engine
            finally:
                server.shutdown()
                thread.join()
