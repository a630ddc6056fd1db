"""The delta image around the delta layers: config and manifest.

Source: ``docs/delta-format.md``; Docker's image manifest v2 schema 2; OCI image specification ``config.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from obdelta.delta.build import DeltaLayer
from obdelta.errors import ManifestInvalid
from obdelta.oci import Descriptor, DiffID, Digest, ImageConfig, common_prefix
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST

BASE_LABEL = "io.resin.delta.base"
CONFIG_LABEL = "io.resin.delta.config"

EMPTY_LAYER_BYTES = bytes.fromhex("1f8b08000000000000ff621805a360148c5800080000ffff2eafb5ef00040000")
"""The well-known empty layer: 1024 zeros as Go's gzip has them. Stands for each layer that both images begin with."""
EMPTY_LAYER = Descriptor(
    DOCKER_LAYER,
    Digest("4f4fb700ef54461cfa02571ae0db9a0dc1e0cdb5577484a6d75e68dc38e8acc1"),
    len(EMPTY_LAYER_BYTES),
)
EMPTY_LAYER_DIFF_ID = DiffID("5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")


class MadeLayer(NamedTuple):
    """What an image says of a finished delta layer: its blob, its tar, and the diff_id that it leads to."""

    digest: Digest
    size: int
    diff_id: DiffID
    target: DiffID


@dataclass(frozen=True, slots=True)
class DeltaImage:
    """Both documents as they are served, with their digests; ``config_descriptor`` is the manifest's."""

    config: bytes
    config_descriptor: Descriptor
    manifest: bytes
    manifest_digest: Digest
    media_type: str


def compose(base: ImageConfig, target: ImageConfig, layers: Sequence[DeltaLayer | MadeLayer]) -> DeltaImage:
    """The delta image that makes ``target`` of ``base``. ``layers`` are those behind the common prefix, bottom to top.

    Deterministic. Raises ManifestInvalid for a target config whose bytes would not survive as a JSON string, or whose layers are
    not those that ``layers`` lead to.
    """
    prefix = common_prefix(base.diff_ids, target.diff_ids)
    if [layer.target for layer in layers] != list(target.diff_ids[prefix:]):
        raise ManifestInvalid("delta image", "its delta layers do not lead to the target's layers")
    diff_ids = [EMPTY_LAYER_DIFF_ID] * prefix + [layer.diff_id for layer in layers]
    descriptors = [EMPTY_LAYER] * prefix + [Descriptor(DOCKER_LAYER, layer.digest, layer.size) for layer in layers]
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


def _config(base: ImageConfig, target: ImageConfig, diff_ids: Sequence[DiffID]) -> dict[str, Any]:
    try:
        text = target.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestInvalid("image config of the target", "it is not UTF-8") from error
    if json.loads(json.dumps(text)).encode("utf-8") != target.raw:
        raise ManifestInvalid("image config of the target", "it does not survive as a JSON string")
    value: dict[str, Any] = {
        name: target.value[name] for name in ("architecture", "os", "variant") if name in target.value
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
