"""Manifests and indexes, parsed once at the edge.

Source: OCI image specification (``manifest.md``, ``image-index.md``) and Docker's image manifest v2 schema 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from obdelta.errors import BadDigest, ManifestInvalid
from obdelta.oci.digest import Digest

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

MANIFEST_TYPES = (DOCKER_MANIFEST, OCI_MANIFEST)
INDEX_TYPES = (DOCKER_LIST, OCI_INDEX)
ACCEPT = (*MANIFEST_TYPES, *INDEX_TYPES)
"""Media types to ask an upstream for."""

MAX_MANIFEST = 4 * 1024 * 1024
"""Bytes; distribution's own limit."""
MAX_CONFIG = 8 * 1024 * 1024
"""Bytes of an image config that is taken."""
MAX_MEDIA_TYPE = 255
"""Characters: 127 before and 127 behind the slash (RFC 6838, section 4.2)."""
MAX_LAYERS = 512
"""Docker stops at 127; more than this is hostile."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of a blob. ``size`` in bytes as it travels (compressed)."""

    media_type: str
    digest: Digest
    size: int

    def as_json(self) -> dict[str, Any]:
        """The object as manifests hold it."""
        return {"mediaType": self.media_type, "size": self.size, "digest": str(self.digest)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of one platform. ``raw`` are the bytes that ``digest`` hashes."""

    raw: bytes
    media_type: str
    digest: Digest
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One image of an index; ``platform`` is ``os/architecture[/variant]`` or ``""``."""

    descriptor: Descriptor
    platform: str


@dataclass(frozen=True, slots=True)
class Index:
    """Several images under one name. Attestations (platform ``unknown/unknown``) are left out of ``entries``."""

    raw: bytes
    media_type: str
    digest: Digest
    entries: tuple[IndexEntry, ...]


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes; ManifestInvalid for anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(what, "it is not JSON") from error
    if not isinstance(value, dict):
        raise ManifestInvalid(what, "it is not a JSON object")
    return value


def parse_descriptor(value: object, what: str) -> Descriptor:
    """One descriptor; ManifestInvalid names ``what`` it belongs to."""
    if not isinstance(value, dict):
        raise ManifestInvalid(what, "a descriptor is not an object")
    size, media_type, digest = value.get("size"), value.get("mediaType"), value.get("digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise ManifestInvalid(what, "a descriptor has no proper size")
    if not isinstance(media_type, str) or not isinstance(digest, str):
        raise ManifestInvalid(what, "a descriptor lacks mediaType or digest")
    if len(media_type) > MAX_MEDIA_TYPE:
        raise ManifestInvalid(what, f"a descriptor's mediaType is longer than {MAX_MEDIA_TYPE}")
    try:
        return Descriptor(media_type, Digest.parse(digest), size)
    except BadDigest as error:
        raise ManifestInvalid(what, "a descriptor's digest is not sha256") from error


def parse_manifest(raw: bytes, content_type: str, what: str = "manifest") -> Manifest | Index:
    """A manifest or index from untrusted bytes.

    ``content_type`` is what the registry said (parameters are ignored); the body's own ``mediaType`` wins where it
    has one. Schema 1 and artifacts are refused with ManifestInvalid.
    """
    if len(raw) > MAX_MANIFEST:
        raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
    value = load_json(raw, what)
    if value.get("schemaVersion") != 2:
        raise ManifestInvalid(what, "its schemaVersion is not 2")
    inner = value.get("mediaType")
    media_type = inner if isinstance(inner, str) else content_type.partition(";")[0].strip().lower()
    digest = Digest.of(raw)
    if media_type in INDEX_TYPES:
        entries = value.get("manifests")
        if not isinstance(entries, list):
            raise ManifestInvalid(what, "an index without a list of manifests")
        found = [_index_entry(entry, what) for entry in entries]
        return Index(raw, media_type, digest, tuple(e for e in found if e.platform != "unknown/unknown"))
    if media_type not in MANIFEST_TYPES:
        raise ManifestInvalid(what, f"media type {media_type[:80]!a} is not an image manifest")
    layers = value.get("layers")
    if not isinstance(layers, list):
        raise ManifestInvalid(what, "it has no list of layers")
    if len(layers) > MAX_LAYERS:
        raise ManifestInvalid(what, f"it has more than {MAX_LAYERS} layers")
    return Manifest(
        raw,
        media_type,
        digest,
        parse_descriptor(value.get("config"), what),
        tuple(parse_descriptor(layer, what) for layer in layers),
    )


def _index_entry(value: object, what: str) -> IndexEntry:
    descriptor = parse_descriptor(value, what)
    platform = value.get("platform") if isinstance(value, dict) else None
    name = ""
    if isinstance(platform, dict):
        parts = (platform.get("os"), platform.get("architecture"), platform.get("variant"))
        name = "/".join(part for part in parts if isinstance(part, str) and part)
    return IndexEntry(descriptor, name)
