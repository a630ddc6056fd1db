"""An image as one tar that engines load, with the same bytes every time.

It is an OCI image layout (OCI image specification, ``image-layout.md``) with a ``manifest.json`` as
``docker save`` writes it. The latter is from the Docker image specification 1.2, "Combined Image
JSON + Filesystem Changeset Format". Current versions of ``docker save`` write both, too. ``docker
load``, ``balena load`` and skopeo's ``docker-archive:`` and ``oci-archive:`` read it. Layers stay
compressed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from obdelta.cli.layout_writer import LAYOUT_FILE, index_of, oci_manifest
from obdelta.oci import Descriptor, Digest, Manifest


def write_archive(
    out: BinaryIO,
    name: str,
    manifest: Manifest,
    fetch: Callable[[Descriptor], Path],
) -> None:
    """Writes the image under ``name`` (``repository:tag``). ``fetch`` writes a blob to a file."""
    raw = oci_manifest(manifest)
    config, layers = manifest.config, list(dict.fromkeys(manifest.layers))
    item = {
        "Config": _place(config.digest),
        "RepoTags": [name],
        "Layers": [_place(layer.digest) for layer in manifest.layers],
    }
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        # Small files go first, so that a reader of the stream knows what follows.
        _add(tar, "oci-layout", LAYOUT_FILE)
        _add(tar, "index.json", json.dumps(index_of(raw, name.rpartition(":")[2], name)).encode())
        _add(tar, "manifest.json", json.dumps([item]).encode())
        _add(tar, _place(Digest.of(raw)), raw)
        for descriptor in (config, *layers):
            with fetch(descriptor).open("rb") as file:
                tar.addfile(_entry(_place(descriptor.digest), descriptor.size), file)


def _place(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_entry(name, len(content)), io.BytesIO(content))


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry
