"""Images put into OCI image layouts on disk (OCI image specification, ``image-layout.md``)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from obdelta.errors import BlobUnknown, ManifestInvalid
from obdelta.oci.digest import Digest
from obdelta.oci.manifest import (
    DOCKER_LAYER,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Manifest,
    load_json,
)

_REF_NAME: Final = "org.opencontainers.image.ref.name"


def put_image(layout: Path, tag: str, manifest: Manifest, blob: Callable[[Digest], Path | None]) -> None:
    """Adds an image under a tag; the layout is made if need be. ``blob`` tells where a blob lies; BlobUnknown if nowhere.

    Docker's media types become OCI's, as tools read no others from a layout; config and layers, and so the image ID, stay.
    The index names the image only when all its blobs are there; an image that had the tag loses it.
    """
    raw = _as_oci(manifest)
    digest = Digest.of(raw)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for descriptor in (manifest.config, *manifest.layers):
        path = blob(descriptor.digest)
        if path is None:
            raise BlobUnknown(descriptor.digest)
        _place(blobs / descriptor.digest.hex, path)
    _write(blobs / digest.hex, raw)
    _write(layout / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    index = layout / "index.json"
    value = (
        load_json(index.read_bytes(), str(index)) if index.exists() else {"schemaVersion": 2, "mediaType": OCI_INDEX}
    )
    others = value.setdefault("manifests", [])
    if not isinstance(others, list):
        raise ManifestInvalid(str(index), "an index without a list of manifests")
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": str(digest),
        "size": len(raw),
        "annotations": {_REF_NAME: tag},
    }
    value["manifests"] = [*(other for other in others if _tag(other) != tag), entry]
    _write(index, json.dumps(value, indent=1).encode())


def _as_oci(manifest: Manifest) -> bytes:
    if manifest.media_type == OCI_MANIFEST:
        return manifest.raw
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": manifest.config.as_json() | {"mediaType": OCI_CONFIG},
        "layers": [
            layer.as_json() | {"mediaType": OCI_LAYER_GZIP if layer.media_type == DOCKER_LAYER else layer.media_type}
            for layer in manifest.layers
        ],
    }
    return json.dumps(value, separators=(",", ":")).encode()


def _tag(entry: Any) -> object:
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    return annotations.get(_REF_NAME) if isinstance(annotations, dict) else None


def _place(final: Path, source: Path) -> None:
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    _sync_and_rename(temporary, final)


def _write(final: Path, content: bytes) -> None:
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    temporary.write_bytes(content)
    _sync_and_rename(temporary, final)


def _sync_and_rename(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
