"""Composes the delta image around the delta layers: its config and manifest.

Source: ``docs/delta-format.md``; Docker's image manifest v2 schema 2; OCI image specification
``config.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from obdelta.delta.reports.layer_report import ExplainedLayer
from obdelta.errors import ManifestInvalid
from obdelta.oci import Descriptor, DiffID, Digest, Form, ImageConfig

BASE_LABEL = "io.resin.delta.base"
CONFIG_LABEL = "io.resin.delta.config"
CREATED_BY = "obdelta"
"""The history of our delta images says this; that of open-balena-delta's does not."""

EMPTY_LAYER_DIFF_ID = DiffID("5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")
"""1024 zeros: the empty tar that balena-engine's own deltas have for each leading layer that both
images share.
"""


class FinishedLayer(NamedTuple):
    """The data of a finished delta layer that an image needs: its blob, its tar, and the diff_id of
    the target layer.
    """

    digest: Digest
    size: int
    diff_id: DiffID
    target: DiffID


class DeltaLayer(NamedTuple):
    """A finished, proven delta layer: ``digest`` and ``size`` of the blob, ``diff_id`` and
    ``tar_size`` of the tar inside.

    ``target`` is the diff_id of the target layer. ``copies`` and ``literals`` are the stream's
    commands, and ``small_copies`` are copies of less than 64 bytes. ``seconds`` are given by stage.
    ``explained`` is None for a layer that is in the base unchanged. ``excess`` are the bytes above
    the bound that its entries give (:mod:`obdelta.delta.size_bound`). ``lost`` are known bytes that
    a plan had lost before it was replaced: 0 unless there is a fault in the search.
    """

    digest: Digest
    size: int
    diff_id: DiffID
    tar_size: int
    target: DiffID
    copies: int
    small_copies: int
    literal_bytes: int
    copied_bytes: int
    seconds: dict[str, float]
    explained: ExplainedLayer | None = None
    excess: int = 0
    lost: int = 0
    literals: int = 0


@dataclass(frozen=True, slots=True)
class DeltaImage:
    """Both documents as they are served; ``config_descriptor`` is the manifest's."""

    config: bytes
    config_descriptor: Descriptor
    manifest: bytes
    media_type: str


def compose(
    base: ImageConfig,
    target: ImageConfig,
    layers: Sequence[DeltaLayer | FinishedLayer],
    form: Form = Form.UNIVERSAL,
    *,
    copies: int = 0,
) -> DeltaImage:
    """Returns the delta image that makes ``target`` of ``base``. ``layers`` lead to the target's
    layers, bottom to top. The first ``copies`` of them are copies of shared layers.

    Deterministic. Raises ManifestInvalid for a target config whose bytes would not survive as a
    JSON string, or whose layers are not those that ``layers`` lead to.
    """
    if [layer.target for layer in layers] != list(target.diff_ids):
        raise ManifestInvalid("delta image", "its delta layers do not lead to the target's layers")
    diff_ids = [layer.diff_id for layer in layers]
    descriptors = [
        Descriptor(
            form.traits.copy_type if number < copies else form.traits.layer_type,
            layer.digest,
            layer.size,
        )
        for number, layer in enumerate(layers)
    ]
    config = _as_json(_config(base, target, diff_ids))
    config_descriptor = Descriptor(form.traits.config_type, Digest.of(config), len(config))
    manifest = _as_json(
        {
            "schemaVersion": 2,
            "mediaType": form.traits.manifest_type,
            "config": config_descriptor.as_json(),
            "layers": [descriptor.as_json() for descriptor in descriptors],
        }
    )
    return DeltaImage(config, config_descriptor, manifest, form.traits.manifest_type)


def config_size(base: ImageConfig, target: ImageConfig) -> int:
    """Returns the length of the delta image's config, which does not depend on the bytes of its
    layers.
    """
    any_layer = "0" * 64
    layers = [
        FinishedLayer(Digest(any_layer), 0, DiffID(any_layer), diff_id)
        for diff_id in target.diff_ids
    ]
    return len(compose(base, target, layers).config)


def _config(base: ImageConfig, target: ImageConfig, diff_ids: Sequence[DiffID]) -> dict[str, Any]:
    try:
        text = target.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestInvalid("image config of the target", "it is not UTF-8") from error
    if json.loads(json.dumps(text)).encode("utf-8") != target.raw:
        raise ManifestInvalid(
            "image config of the target", "a JSON string cannot hold it unchanged"
        )
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
    value["history"] = [{"created": value["created"], "created_by": CREATED_BY} for _ in diff_ids]
    return value


def _as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")
