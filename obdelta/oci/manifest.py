"""Manifests and indexes, parsed and checked once, on arrival; media types.

Source: OCI image specification (``manifest.md``, ``image-index.md``) and Docker's image manifest v2
schema 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from obdelta.errors import BadDigest, ManifestInvalid
from obdelta.oci.digest import Digest
from obdelta.oci.image_names import known_annotations

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"

MANIFEST_TYPES = (DOCKER_MANIFEST, OCI_MANIFEST)
INDEX_TYPES = (DOCKER_LIST, OCI_INDEX)
ACCEPT = (*MANIFEST_TYPES, *INDEX_TYPES)
"""Media types that requests to an upstream accept."""

MAX_MANIFEST = 4 * 1024 * 1024
"""Maximum number of bytes of a manifest; distribution has the same limit."""
MAX_CONFIG = 64 * 1024 * 1024
"""Maximum number of bytes of an image config."""
MAX_JSON_PARTS = 1_000_000
"""Maximum number of commas, colons and opening brackets in one document, those in strings included.
Parsed values take up to a hundred bytes of memory each, so this bounds the cost of a hostile
document. Real documents have thousands.
"""
MAX_MEDIA_TYPE = 255
"""Characters: 127 before and 127 after the slash (RFC 6838, section 4.2)."""
MAX_LAYERS = 512
"""Maximum number of layers of an image. Docker's limit is 127; more than 512 are hostile."""
_MEDIA_TYPE = re.compile(r"[!-~ ]*", re.ASCII)
_ATTESTATION_ANNOTATION = "vnd.docker.reference.type"
"""BuildKit's annotation on attestations in an index."""
_MANIFEST_FIELDS = ("schemaVersion", "mediaType", "config", "layers", "manifests")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A manifest's reference to a blob. ``size`` is in bytes as it travels (compressed)."""

    media_type: str
    digest: Digest
    size: int

    def as_json(self) -> dict[str, Any]:
        """Returns the object in the form that manifests hold."""
        return {"mediaType": self.media_type, "size": self.size, "digest": str(self.digest)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of one platform. ``raw`` are the bytes that ``digest`` hashes. ``annotations`` are
    those that name the image (:mod:`obdelta.oci.image_names`).
    """

    raw: bytes
    media_type: str
    digest: Digest
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One image of an index; ``platform`` is ``os/architecture[/variant]`` or ``""``."""

    descriptor: Descriptor
    platform: str


@dataclass(frozen=True, slots=True)
class Index:
    """Several images under one name. ``entries`` has each digest once, and no attestations or
    artifacts.
    """

    raw: bytes
    media_type: str
    digest: Digest
    entries: tuple[IndexEntry, ...]

    def candidates(self) -> list[Descriptor]:
        """Returns the images that a device's engine may take, for any platform; without images, the
        nested indexes.

        Engines filter by platform and take the first image left, so images of the same platform
        count as one. A nested index is examined only if there is no image.
        """
        images = [entry for entry in self.entries if entry.descriptor.media_type not in INDEX_TYPES]
        if images and images[0].platform and len({entry.platform for entry in images}) == 1:
            return [images[0].descriptor]
        return [entry.descriptor for entry in images or self.entries]


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """Returns a JSON object from untrusted bytes, as strictly as Go's decoder. Raises
    ManifestInvalid for anything else.
    """
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > MAX_JSON_PARTS:
        raise ManifestInvalid(what, f"it has more than {MAX_JSON_PARTS} values")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(what, "it is not JSON") from error
    if not isinstance(value, dict):
        raise ManifestInvalid(what, "it is not a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_spelling(value: dict[str, Any], names: Collection[str], what: str) -> None:
    """Raises ManifestInvalid if a key differs from one of ``names`` only by its case.

    Go's decoder accepts such keys as if they were spelled correctly; no code here does.
    """
    folded = {name.casefold(): name for name in names}
    for key in value:
        name = folded.get(key.casefold()) if len(key) <= MAX_MEDIA_TYPE else None
        if name is not None and name != key:
            raise ManifestInvalid(what, f"a key is spelled {key!a} instead of {name}")


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Returns one descriptor. The ManifestInvalid that it raises names ``what`` the value belongs
    to.
    """
    if not isinstance(value, dict):
        raise ManifestInvalid(what, "a descriptor is not an object")
    size, media_type, digest = value.get("size"), value.get("mediaType"), value.get("digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise ManifestInvalid(what, "a descriptor has no valid size")
    if not isinstance(media_type, str) or not isinstance(digest, str):
        raise ManifestInvalid(what, "a descriptor lacks mediaType or digest")
    if len(media_type) > MAX_MEDIA_TYPE or _MEDIA_TYPE.fullmatch(media_type) is None:
        raise ManifestInvalid(
            what, f"a descriptor's mediaType is longer than {MAX_MEDIA_TYPE} or not printable"
        )
    try:
        return Descriptor(media_type, Digest.parse(digest), size)
    except BadDigest as error:
        raise ManifestInvalid(what, "a descriptor's digest is not sha256") from error


def parse_descriptors(values: object, what: str) -> list[tuple[Descriptor, dict[str, Any]]]:
    """Returns the readable entries of an index with their objects, and skips unreadable ones.

    Engines examine only the entry that they take. Raises ManifestInvalid if there are entries
    and none is readable.
    """
    if not isinstance(values, list):
        raise ManifestInvalid(what, "it has no list of manifests")
    found: list[tuple[Descriptor, dict[str, Any]]] = []
    unreadable: ManifestInvalid | None = None
    for value in values:
        try:
            found.append((parse_descriptor(value, what), value))
        except ManifestInvalid as error:
            unreadable = error
    if unreadable is not None and not found:
        raise unreadable
    return found


def parse_manifest(raw: bytes, content_type: str, what: str = "manifest") -> Manifest | Index:
    """Returns a manifest or index from untrusted bytes.

    ``content_type`` is the registry's header (parameters are ignored). The body's own ``mediaType``
    wins if present. Raises ManifestInvalid for schema 1 and artifacts.
    """
    if len(raw) > MAX_MANIFEST:
        raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
    value = load_json(raw, what)
    check_spelling(value, _MANIFEST_FIELDS, what)
    version = value.get("schemaVersion")
    if version != 2 or isinstance(version, bool):
        raise ManifestInvalid(what, "its schemaVersion is not 2")
    inner = value.get("mediaType")
    media_type = (
        inner
        if isinstance(inner, str) and inner
        else content_type.partition(";")[0].strip().lower()
    )
    digest = Digest.of(raw)
    if media_type in INDEX_TYPES:
        return Index(raw, media_type, digest, _index_entries(value.get("manifests"), what))
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
        known_annotations(value.get("annotations")),
    )


def _index_entries(values: object, what: str) -> tuple[IndexEntry, ...]:
    entries: dict[Digest, IndexEntry] = {}
    for descriptor, value in parse_descriptors(values, what):
        platform = _platform(value.get("platform"))
        if platform == "unknown/unknown" or is_artifact(descriptor, value):
            continue
        entries.setdefault(descriptor.digest, IndexEntry(descriptor, platform))
    return tuple(entries.values())


def is_artifact(descriptor: Descriptor, value: dict[str, Any]) -> bool:
    """Returns whether an index's entry declares itself an attestation or another artifact."""
    annotations = value.get("annotations")
    marked = isinstance(annotations, dict) and annotations.get(_ATTESTATION_ANNOTATION) is not None
    return (
        marked
        or bool(value.get("artifactType"))
        or descriptor.media_type not in (*MANIFEST_TYPES, *INDEX_TYPES)
    )


def _platform(value: object) -> str:
    if not isinstance(value, dict):
        return ""
    parts = (value.get("os"), value.get("architecture"), value.get("variant"))
    return "/".join(part for part in parts if isinstance(part, str) and part)
