"""Image configs: parses the JSON whose digest is the image ID.

Source: OCI image specification, ``config.md``; Docker image specification v1.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from obdelta.errors import BadDigest, ManifestInvalid
from obdelta.oci.digest import DiffID, Digest
from obdelta.oci.manifest import MAX_CONFIG, check_spelling, load_json

_TEXTS = ("architecture", "os", "variant")
_FIELDS = (*_TEXTS, "created", "config", "rootfs", "history")
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.,][0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
"""Times as Go reads them (RFC 3339)."""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """A parsed image config. ``raw`` are the bytes that the image ID hashes; ``value`` is the
    parsed object, which callers must not change.
    """

    raw: bytes
    image_id: Digest
    diff_ids: tuple[DiffID, ...]
    value: dict[str, Any]


def parse_config(raw: bytes, what: str = "image config") -> ImageConfig:
    """Returns a config from untrusted bytes. Raises ManifestInvalid for content that an engine
    would read differently.
    """
    if len(raw) > MAX_CONFIG:
        raise ManifestInvalid(what, f"it is larger than {MAX_CONFIG} bytes")
    value = load_json(raw, what)
    check_spelling(value, _FIELDS, what)
    rootfs = value.get("rootfs")
    if not isinstance(rootfs, dict) or rootfs.get("type", "layers") != "layers":
        raise ManifestInvalid(what, "it has no rootfs of type layers")
    check_spelling(rootfs, ("type", "diff_ids"), what)
    found = rootfs.get("diff_ids")
    if found is None:
        found = []
    if not isinstance(found, list) or not all(isinstance(diff_id, str) for diff_id in found):
        raise ManifestInvalid(what, "its rootfs has no list of diff_ids")
    for name in _TEXTS:
        if not isinstance(value.get(name, ""), str | None):
            raise ManifestInvalid(what, f"its {name} is not text")
    created = value.get("created")
    if created is not None and (not isinstance(created, str) or _TIME.fullmatch(created) is None):
        raise ManifestInvalid(what, "its created is not a time")
    _check_labels(value.get("config"), what)
    try:
        diff_ids = tuple(DiffID.parse(diff_id) for diff_id in found)
    except BadDigest as error:
        raise ManifestInvalid(what, "a diff_id is not sha256") from error
    return ImageConfig(raw, Digest.of(raw), diff_ids, value)


def _check_labels(config: object, what: str) -> None:
    """Raises ManifestInvalid if Go cannot decode ``config`` or its labels."""
    if config is None:
        return
    if not isinstance(config, dict):
        raise ManifestInvalid(what, "its config is not an object")
    for key, labels in config.items():
        if key.casefold() != "labels" or labels is None:
            continue  # Go takes a name in any case
        if not isinstance(labels, dict) or not all(
            isinstance(label, str | None) for label in labels.values()
        ):
            raise ManifestInvalid(what, "one of its labels is not text")
