"""Writer of images to OCI image layouts on disk (OCI image specification, ``image-layout.md``)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from obdelta.errors import ManifestInvalid
from obdelta.oci.digest import Digest
from obdelta.oci.manifest import (
    DOCKER_LAYER,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    load_json,
)

LAYOUT_FILE: Final = b'{"imageLayoutVersion":"1.0.0"}'
_REF_NAME: Final = "org.opencontainers.image.ref.name"
_IMAGE_NAME: Final = "io.containerd.image.name"


def put_image(
    layout: Path, tag: str, manifest: Manifest, fetch: Callable[[Descriptor], Path]
) -> None:
    """Adds an image under a tag, and makes the layout if needed. ``fetch`` writes a blob to a file.

    Docker's media types become OCI's, as tools read no others from a layout. Config and layers, and
    so the image ID, stay. The index names the image only when all its blobs are there. An image
    that had the tag loses it.
    """
    raw = oci_manifest(manifest)
    digest = Digest.of(raw)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for descriptor in (manifest.config, *manifest.layers):
        _place(blobs / descriptor.digest.hex, fetch(descriptor))
    _write(blobs / digest.hex, raw)
    _write(layout / "oci-layout", LAYOUT_FILE)
    index = layout / "index.json"
    value = (
        load_json(index.read_bytes(), str(index))
        if index.exists()
        else {"schemaVersion": 2, "mediaType": OCI_INDEX}
    )
    others = value.setdefault("manifests", [])
    if not isinstance(others, list):
        raise ManifestInvalid(str(index), "an index without a list of manifests")
    value["manifests"] = [
        *(other for other in others if _tag(other) != tag),
        *index_of(raw, tag)["manifests"],
    ]
    _write(index, json.dumps(value, indent=1).encode())


def index_of(raw: bytes, tag: str, name: str | None = None) -> dict[str, Any]:
    """Returns the ``index.json`` of a layout with one image, whose OCI manifest is ``raw``.
    ``name`` is the full name, for containerd.
    """
    annotations = {_REF_NAME: tag} | ({_IMAGE_NAME: name} if name is not None else {})
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": str(Digest.of(raw)),
        "size": len(raw),
        "annotations": annotations,
    }
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}


def oci_manifest(manifest: Manifest) -> bytes:
    """Returns a manifest's bytes with OCI's media types."""
    if manifest.media_type == OCI_MANIFEST:
        return manifest.raw
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": manifest.config.as_json() | {"mediaType": OCI_CONFIG},
        "layers": [
            layer.as_json()
            | {
                "mediaType": OCI_LAYER_GZIP
                if layer.media_type == DOCKER_LAYER
                else layer.media_type
            }
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
