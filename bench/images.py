"""Container images in OCI layouts, made of layers; :func:`push` pushes them into a registry.

OCI image layouts (OCI image specification, ``image-layout.md``) with Docker schema 2 or OCI
manifests. The layouts are as obdelta's embedded upstream ``oci:DIR`` expects them: one layout a
repository at ``DIR/<repository>/``, tags as ``org.opencontainers.image.ref.name`` annotations of
``index.json``.
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bench.layers import (
    MTIME,
    Compression,
    Entry,
    Format,
    Layer,
    directory,
    file,
    from_tree,
    hardlink,
    make_layer,
    opaque,
    symlink,
    tidied,
    whiteout,
)
from obdelta.oci.digest import DiffID, Digest
from obdelta.oci.manifest import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
)

__all__ = [
    "MTIME",
    "Compression",
    "Entry",
    "Format",
    "Image",
    "ImageIndex",
    "Layer",
    "PushFailed",
    "directory",
    "file",
    "from_tree",
    "hardlink",
    "make_image",
    "make_index",
    "make_layer",
    "opaque",
    "push",
    "symlink",
    "tidied",
    "whiteout",
]

CREATED = "2023-11-14T22:13:20Z"
REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an OCI layout. ``layers`` bottom to top; ``image_id`` is the digest of
    ``config``.
    """

    layout: Path
    name: str
    manifest: bytes
    media_type: str
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> Digest:
        """The digest of the manifest."""
        return Digest.of(self.manifest)

    @property
    def image_id(self) -> Digest:
        """The digest of the config."""
        return Digest.of(self.config)

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """Bottom to top."""
        return tuple(layer.diff_id for layer in self.layers)


def make_image(
    layers: Sequence[Layer],
    layout: Path,
    *,
    name: str = "latest",
    format: Format = "docker",
    architecture: str = "amd64",
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
) -> Image:
    """Writes an image of these layers into the OCI layout at ``layout`` (created if necessary)
    under tag ``name``.

    ``config`` is merged over the config's top level. An older image of the same name loses the
    name.
    """
    blobs = _open_layout(layout)
    for layer in layers:
        if not (path := blobs / layer.digest.hex).exists():
            try:
                path.hardlink_to(layer.path)
            except OSError:  # another file system
                shutil.copyfile(layer.path, path)
    value = {
        "architecture": architecture,
        "os": "linux",
        "created": CREATED,
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"], "Labels": labels or {}},
        "history": [
            {"created": CREATED, "created_by": f"layer {number}"} for number in range(len(layers))
        ],
        "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in layers]},
        **(config or {}),
    }
    raw_config = _json(value)
    config_digest = _put(blobs, raw_config)
    media_type = DOCKER_MANIFEST if format == "docker" else OCI_MANIFEST
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {
                "mediaType": DOCKER_CONFIG if format == "docker" else OCI_CONFIG,
                "size": len(raw_config),
                "digest": str(config_digest),
            },
            "layers": [
                {
                    "mediaType": layer.media_type(format),
                    "size": layer.size,
                    "digest": str(layer.digest),
                }
                for layer in layers
            ],
        }
    )
    _put(blobs, manifest)
    _name(layout, manifest, media_type, name)
    return Image(layout, name, manifest, media_type, raw_config, tuple(layers))


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """A manifest list (Docker) or index (OCI) over images of the same layout."""

    layout: Path
    name: str
    manifest: bytes
    media_type: str
    images: tuple[Image, ...]

    @property
    def digest(self) -> Digest:
        """The digest of the index."""
        return Digest.of(self.manifest)


def make_index(
    images: Sequence[tuple[Image, dict[str, str]]],
    layout: Path,
    *,
    name: str = "latest",
    format: Format = "docker",
) -> ImageIndex:
    """Writes an index over images of the same layout, each with its platform (``{"os": …,
    "architecture": …}``).
    """
    blobs = _open_layout(layout)
    media_type = DOCKER_LIST if format == "docker" else OCI_INDEX
    manifests = [
        {
            "mediaType": image.media_type,
            "size": len(image.manifest),
            "digest": str(image.digest),
            "platform": platform,
        }
        for image, platform in images
    ]
    raw = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})
    _put(blobs, raw)
    _name(layout, raw, media_type, name)
    return ImageIndex(layout, name, raw, media_type, tuple(image for image, _ in images))


def _open_layout(layout: Path) -> Path:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return blobs


def _name(layout: Path, manifest: bytes, media_type: str, name: str) -> None:
    path = layout / "index.json"
    entries = json.loads(path.read_bytes())["manifests"] if path.exists() else []
    entries = [entry for entry in entries if entry.get("annotations", {}).get(REF_NAME) != name]
    entries.append(
        {
            "mediaType": media_type,
            "size": len(manifest),
            "digest": str(Digest.of(manifest)),
            "annotations": {REF_NAME: name},
        }
    )
    fresh = path.with_suffix(".new")
    fresh.write_bytes(_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}))
    fresh.replace(path)


def _put(blobs: Path, content: bytes) -> Digest:
    digest = Digest.of(content)
    (blobs / digest.hex).write_bytes(content)
    return digest


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# -- push --------------------------------------------------------------------------------------


class PushFailed(Exception):
    """The registry refused a blob or manifest."""


def push(
    image: Image | ImageIndex,
    registry: str,
    repository: str,
    tag: str | None = None,
    *,
    authorization: str | None = None,
) -> Digest:
    """Pushes to ``registry`` (``http://host:port``); returns the manifest's digest.

    ``tag`` None: the image's name. ``authorization`` is the header's whole value (``Bearer …``,
    ``Basic …``). Raises PushFailed, OSError.
    """
    url = urllib.parse.urlsplit(registry)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.netloc, timeout=300)
    headers = {"Authorization": authorization} if authorization else {}
    pusher = _Pusher(connection, f"/v2/{repository}", headers)
    try:
        if isinstance(image, ImageIndex):
            for child in image.images:
                pusher.image(child, str(child.digest))
        else:
            pusher.blobs(image)
        pusher.manifest(image.manifest, image.media_type, tag or image.name)
    finally:
        connection.close()
    return image.digest


class _Pusher:
    def __init__(
        self, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
    ) -> None:
        self._connection, self._path, self._headers = connection, path, headers

    def image(self, image: Image, selector: str) -> None:
        self.blobs(image)
        self.manifest(image.manifest, image.media_type, selector)

    def blobs(self, image: Image) -> None:
        for layer in image.layers:
            with layer.path.open("rb") as content:
                self._blob(layer.digest, layer.size, content)
        self._blob(image.image_id, len(image.config), io.BytesIO(image.config))

    def manifest(self, raw: bytes, media_type: str, selector: str) -> None:
        self._ask(
            "PUT", f"{self._path}/manifests/{selector}", (201,), raw, {"Content-Type": media_type}
        )

    def _blob(self, digest: Digest, size: int, content: BinaryIO) -> None:
        if self._ask("HEAD", f"{self._path}/blobs/{digest}", (200, 404))[0] == 200:
            return
        location = urllib.parse.urlsplit(
            self._ask("POST", f"{self._path}/blobs/uploads/", (202,))[1]
        )
        query = f"{location.query}&digest={digest}" if location.query else f"digest={digest}"
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self._ask("PUT", f"{location.path}?{query}", (201,), content, headers)

    def _ask(
        self,
        method: str,
        path: str,
        expected: tuple[int, ...],
        body: bytes | BinaryIO | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        self._connection.request(method, path, body, {**self._headers, **(headers or {})})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status not in expected:
            reason = answer[:200].decode("utf-8", "replace")
            raise PushFailed(
                f"{method} {path.partition('?')[0]}: status {response.status} {reason}"
            )
        return response.status, response.headers.get("Location", "")
