"""``publish = registry``: pushes finished v3 deltas to the registry, under tags of its own.

Deltas are named as open-balena-delta names them, so that each finds and uses what the other has
pushed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack

from obdelta.builds.publish.delta_tags import registry_tag
from obdelta.builds.publish.registry_pushes import PushParts, RegistryPushes
from obdelta.builds.types import Pair, Published
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.errors import ManifestUnknown
from obdelta.oci import Form, Manifest, Reference, parse_manifest
from obdelta.registry.upload import PushResult
from obdelta.store.catalogue.records import DeltaRow


class RegistryPublisher(RegistryPushes[Published]):
    """Finds delta images in the registry, and pushes them there."""

    def __init__(
        self,
        parts: PushParts,
        *,
        host: str,
        tag: Callable[[Pair], str] = registry_tag,
        others: bool = False,
    ) -> None:
        """``tag`` names a pair's delta. ``others``: see :class:`RegistryPushes`."""
        super().__init__(parts, host=host, others=others)
        self._tag_of = tag

    def _tag(self, pair: Pair) -> str:
        return self._tag_of(pair)

    def _published(self, pair: Pair, name: Reference, row: DeltaRow) -> Published:
        return Published(pair, name, row.full_bytes, row.delta_bytes)

    async def _found_there(self, pair: Pair, name: Reference) -> Published | str:
        repository, credentials = pair.target.repository, self._credentials
        manifest = await self._upstream.manifest(repository, str(name.tag), credentials)
        if not isinstance(manifest, Manifest):
            return "it is an index"
        config = await self._upstream.config(repository, manifest.config, credentials)
        value = config.value.get("config")
        labels = value.get("Labels") if isinstance(value, dict) else None
        labels = labels if isinstance(labels, dict) else {}
        target = labels.get(CONFIG_LABEL)
        if labels.get(BASE_LABEL) != str(pair.base.manifest.config.digest):
            return "it starts from another base"
        if not isinstance(target, str) or _sha256(target) != pair.target.manifest.config.digest.hex:
            return "it leads to another target"
        if len(manifest.layers) != len(pair.target.manifest.layers):
            return "it has another number of layers than its target"
        needed = Form.of_layers(manifest.layers)
        if needed not in pair.form.readable:
            return f"it is compressed with {needed.value}, which some engines do not read"
        if EMPTY_LAYER_DIFF_ID in config.diff_ids:
            return (
                "it has empty layers for what base and target share, which fail in host-OS updates"
            )
        for layer in dict.fromkeys(manifest.layers):
            if not await self._pusher.has_blob(repository, layer, credentials):
                return f"its layer {layer.digest} is gone"
        return Published(pair, name, pair.full_bytes, pair.pull_bytes(manifest))

    async def _send(self, pair: Pair, row: DeltaRow, tag: str) -> PushResult:
        repository = pair.target.repository
        kept = await self._catalogue.manifest(repository, row.content)
        if kept is None:
            raise ManifestUnknown(repository, str(row.content))
        manifest = parse_manifest(kept.raw, kept.media_type)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was published is the manifest of one image")
        with ExitStack() as pins:
            for descriptor in (manifest.config, *manifest.layers):
                pins.enter_context(self._blobs.pin(descriptor.digest))
            return await self._pusher.push(
                repository,
                tag,
                manifest,
                self._blobs.path,
                self._credentials,
                # The same contents under another name: the layers are in the repository of the
                # first push.
                mount_from=[row.target_repository] if row.target_repository != repository else [],
            )


def _sha256(text: str) -> str:
    # A lone surrogate out of JSON has no bytes that could be an image's config.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
