"""A test double: a small registry that answers as odd registries, caches and storages do.

No real one can be had that does. Blobs and manifests are in memory. ``registry.odd`` is called
first with every request; it returns True if it has answered.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bench.images import Image
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST


def digest_of(content: bytes) -> str:
    """Returns ``sha256:<hex>``."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Seen:
    """One request; header names in lower case, with all their values in order."""

    method: str
    path: str
    headers: dict[str, list[str]]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    registry: OddRegistry

    def do_GET(self) -> None:
        """Answers a GET or HEAD."""
        headers: dict[str, list[str]] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        with self.registry.lock:
            self.registry.seen.append(Seen(self.command, self.path, headers))
        if self.registry.odd is None or not self.registry.odd(self):
            self.plain()

    do_HEAD = do_GET

    def plain(self) -> None:
        """Answers as a registry should; no ranges."""
        if self.path.rstrip("/") == "/v2":
            self.reply(200, b"{}")
            return
        repository, _, rest = self.path.removeprefix("/v2/").partition("/manifests/")
        if rest:
            found = self.registry.manifests.get((repository, rest))
            if found is None:
                self.reply(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
            else:
                media_type, raw = found
                self.reply(200, raw, content_type=media_type, docker_content_digest=digest_of(raw))
            return
        blob = self.registry.blobs.get(self.path.rpartition("/")[2])
        if blob is None:
            self.reply(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}')
        else:
            self.reply(200, blob, content_type="application/octet-stream")

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Sends a whole answer; ``content_type="…"`` gives ``content-type``."""
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def close_delimited(self, body: bytes, *, version: str = "HTTP/1.1", **headers: str) -> None:
        """Sends a body without a length, ended by closing the connection."""
        sent = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.wfile.write(f"{version} 200 OK\r\n{sent}\r\n".encode())
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


@dataclass
class OddRegistry:
    """``manifests``: by repository and tag or digest, media type and bytes;
    ``blobs``: by digest.
    """

    url: str = ""
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    odd: Callable[[Handler], bool] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put_manifest(
        self, repository: str, raw: bytes, media_type: str = DOCKER_MANIFEST, tag: str = "latest"
    ) -> str:
        """Puts a manifest under its digest and a tag; returns the digest."""
        for reference in (tag, digest_of(raw)):
            self.manifests[repository, reference] = (media_type, raw)
        return digest_of(raw)

    def put_blob(self, content: bytes) -> str:
        """Puts a blob; returns its digest."""
        self.blobs[digest_of(content)] = content
        return digest_of(content)

    def put(
        self,
        repository: str,
        config: bytes,
        layers: Sequence[bytes],
        *,
        change: Callable[[dict[str, Any]], None] = lambda manifest: None,
    ) -> str:
        """Puts an image of a raw config and layer blobs; ``change`` may alter the manifest. Returns
        its digest.
        """
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": self._descriptor(DOCKER_CONFIG, config),
            "layers": [self._descriptor(DOCKER_LAYER, layer) for layer in layers],
        }
        change(manifest)
        return self.put_manifest(repository, json.dumps(manifest).encode())

    def put_image(
        self,
        repository: str,
        image: Image,
        *,
        change: Callable[[dict[str, Any]], None] = lambda manifest: None,
    ) -> str:
        """Puts an image that the benchmarks' generator made; ``change`` may alter the manifest.
        Returns its digest.
        """
        layers = [
            (image.layout / "blobs/sha256" / layer.digest.hex).read_bytes()
            for layer in image.layers
        ]
        return self.put(repository, image.config, layers, change=change)

    def _descriptor(self, media_type: str, content: bytes) -> dict[str, Any]:
        return {"mediaType": media_type, "size": len(content), "digest": self.put_blob(content)}

    def requests_to(self, part: str) -> list[Seen]:
        """Returns the requests whose path contains ``part``."""
        return [seen for seen in self.seen if part in seen.path]


@contextmanager
def odd_registry(odd: Callable[[Handler], bool] | None = None) -> Iterator[OddRegistry]:
    """Runs one on a free loopback port."""
    registry = OddRegistry(odd=odd)

    class Bound(Handler):
        pass

    Bound.registry = registry
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    registry.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="odd-registry")
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
