"""Composes the delta image around the delta layers: its config and manifest.

Source: ``docs/delta-format.md``; Docker's image manifest v2 schema 2; OCI image specification
``config.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from obdelta.delta.build import DeltaLayer
from obdelta.errors import ManifestInvalid
from obdelta.oci import Descriptor, DiffID, Digest, ImageConfig
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST

BASE_LABEL = "io.resin.delta.base"
CONFIG_LABEL = "io.resin.delta.config"

EMPTY_LAYER_DIFF_ID = DiffID("5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")
"""1024 zeros: the empty tar that balena-engine's own deltas have for each leading layer that both
images share.
"""


class MadeLayer(NamedTuple):
    """An image's data about a finished delta layer: its blob, its tar, and the diff_id of the
    target layer.
    """

    digest: Digest
    size: int
    diff_id: DiffID
    target: DiffID


@dataclass(frozen=True, slots=True)
class DeltaImage:
    """Both documents as they are served, with their digests; ``config_descriptor`` is the
    manifest's.
    """

    config: bytes
    config_descriptor: Descriptor
    manifest: bytes
    manifest_digest: Digest
    media_type: str


def compose(
    base: ImageConfig, target: ImageConfig, layers: Sequence[DeltaLayer | MadeLayer]
) -> DeltaImage:
    """Returns the delta image that makes ``target`` of ``base``. ``layers`` lead to the target's
    layers, bottom to top.

    Deterministic. Raises ManifestInvalid for a target config whose bytes would not survive as a
    JSON string, or whose layers are not those that ``layers`` lead to.
    """
    if [layer.target for layer in layers] != list(target.diff_ids):
        raise ManifestInvalid("delta image", "its delta layers do not lead to the target's layers")
    diff_ids = [layer.diff_id for layer in layers]
    descriptors = [Descriptor(DOCKER_LAYER, layer.digest, layer.size) for layer in layers]
    config = _as_json(_config(base, target, diff_ids))
    config_descriptor = Descriptor(DOCKER_CONFIG, Digest.of(config), len(config))
    manifest = _as_json(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": config_descriptor.as_json(),
            "layers": [descriptor.as_json() for descriptor in descriptors],
        }
    )
    return DeltaImage(config, config_descriptor, manifest, Digest.of(manifest), DOCKER_MANIFEST)


def config_size(base: ImageConfig, target: ImageConfig) -> int:
    """Returns the length of the delta image's config, which does not depend on the bytes of its
    layers.
    """
    any_layer = "0" * 64
    layers = [
        MadeLayer(Digest(any_layer), 0, DiffID(any_layer), diff_id) for diff_id in target.diff_ids
    ]
    return len(compose(base, target, layers).config)


def _config(base: ImageConfig, target: ImageConfig, diff_ids: Sequence[DiffID]) -> dict[str, Any]:
    try:
        text = target.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestInvalid("image config of the target", "it is not UTF-8") from error
    if json.loads(json.dumps(text)).encode("utf-8") != target.raw:
        raise ManifestInvalid("image config of the target", "it does not survive as a JSON string")
    value: dict[str, Any] = {
        name: target.value[name]
        for name in ("architecture", "os", "variant")
        if name in target.value
    }
    value.setdefault("architecture", "amd64")
    value.setdefault("os", "linux")
    value["created"] = target.value.get("created") or "1970-01-01T00:00:00Z"
    value["config"] = {"Labels": {BASE_LABEL: str(base.image_id), CONFIG_LABEL: text}}
    value["rootfs"] = {"type": "layers", "diff_ids": [str(diff_id) for diff_id in diff_ids]}
    value["history"] = [{"created": value["created"], "created_by": "obdelta"} for _ in diff_ids]
    return value


def _as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")
