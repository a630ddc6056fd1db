"""A test double of a balena-engine's HTTP API over a unix socket, written by hand after its
documented behaviour: Debian has no package of one. What it shares with Docker (pull, save, remove,
credentials, errors) is also tested on a real ``dockerd`` (``tests/unit/builds/test_engine.py``).

Its images are those of ``engine_images.py``.

    with running_engine(directory) as engine:
        engine.url                        # for docker-host
        engine.images                     # IDs of the images that it has
        engine.say("delta", {"error": "…"})   # in the middle of the next answer's stream
"""

from __future__ import annotations

import base64
import json
import socket
import socketserver
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from obdelta.errors import ObdeltaError
from tests.support.engine_images import EngineDouble, Kept, saved


class _Answers(BaseHTTPRequestHandler):
    engine: EngineDouble
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, so that pytest's output stays readable."""

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

    def _scripted(self, what: str) -> bool:
        """Returns whether the test ends the answer here."""
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
        if self._scripted("pull"):
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
        if self._scripted("delta"):
            return None
        made = self.engine.delta(base, target)
        self._message(status="Normal size: 1 MB, Delta size: 1 kB, 1000.00x improvement")
        self._message(status=f"Created delta: {made.id}")
        made.names.add(query["t"])
        self._message(status=f"Successfully tagged {query['t']}")
        self._chunk(b"")
        return None

    def _save(self, image: Kept) -> None:
        self._begin("application/x-tar")
        content = saved(image)
        for at in range(0, len(content), 65536):
            self._chunk(content[at : at + 65536])
        self._chunk(b"")


class _Quiet(socketserver.ThreadingMixIn):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of clients that disconnect."""


class _UnixServer(_Quiet, socketserver.UnixStreamServer):
    pass


class _TcpServer(_Quiet, socketserver.TCPServer):
    pass


def no_token(_credentials: dict[str, str], _repository: str) -> str | None:
    """Returns no token, for an open registry."""
    return None


def builders_token(tokens: Any) -> Any:
    """Returns a function that gets a token at the realm (``tokens`` of ``tests.support.registry``)
    with user and password, as the engine does.
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
    """Runs an engine before ``registry`` (a URL). ``token(credentials, repository)`` exchanges the
    credentials of a pull for a token. With ``tls`` it listens on a loopback port instead of a
    socket.
    """
    # A short path: a socket's may have 107 bytes.
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
