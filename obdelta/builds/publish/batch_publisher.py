"""Publishes v2 batches: pushes each to the registry as an OCI artifact, which every replica finds
there.

Source: OCI image specification 1.1, "Guidelines for artifact usage" (an empty config, one layer).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from obdelta.builds.publish.registry_pushes import FOUND_SECONDS, PushParts, RegistryPushes
from obdelta.builds.types import Pair, Ready
from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.concurrency.tasks import SingleFlight
from obdelta.errors import Missing
from obdelta.oci import Descriptor, Digest, Manifest, Reference, parse_manifest
from obdelta.oci.manifest import OCI_MANIFEST, load_json
from obdelta.registry.upload import PushResult
from obdelta.rsync.batch import BEFORE_DONES
from obdelta.store.catalogue.records import DeltaKey, DeltaRow

ARTIFACT_TYPE = "application/vnd.obdelta.batch.v2"
BATCH_TYPE = "application/vnd.obdelta.batch.v2.rsync"
"""The media type of the only layer: the batch as devices download it."""
EMPTY_CONFIG = b"{}"
BATCH_TAG = re.compile(r"delta2-[0-9a-f]{16}", re.ASCII)
"""The tag of a batch, as :func:`batch_tag` makes it."""
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_BASE, _TARGET, _RECIPE, _TAIL, _SENT = (
    f"io.obdelta.batch.{name}" for name in ("base", "target", "recipe", "tail", "sent-index")
)
_KEPT = 4096
_MAX_INDEX = 1 << 31


def batch_tag(key: DeltaKey) -> str:
    """Returns ``delta2-<16 hex>``: a name for both images' contents and the recipe, so that its
    meaning never changes.
    """
    text = f"{key.kind} {key.recipe} {key.base} {key.target}"
    return f"delta2-{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}"


def batch_manifest(row: DeltaRow) -> Manifest:
    """Returns the artifact of a batch: the same bytes on every server for the same batch."""
    annotations = {
        _BASE: str(row.key.base),
        _TARGET: str(row.key.target),
        _RECIPE: str(row.key.recipe),
        _TAIL: str(row.details["tail"]),
    }
    if row.details.get("sent_index") is not None:
        annotations[_SENT] = str(row.details["sent_index"])
    config = Descriptor(_EMPTY_TYPE, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG))
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": config.as_json(),
        "layers": [Descriptor(BATCH_TYPE, row.content, row.delta_bytes).as_json()],
        "annotations": annotations,
    }
    raw = json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")
    manifest = parse_manifest(raw, OCI_MANIFEST)
    if not isinstance(manifest, Manifest):
        raise AssertionError("an artifact is no index")
    return manifest


def is_batch(manifest: Manifest) -> bool:
    """Returns whether a manifest is the artifact of a batch. Raises ManifestInvalid."""
    return load_json(manifest.raw, "artifact").get("artifactType") == ARTIFACT_TYPE


class BatchPublisher(RegistryPushes[Ready]):
    """Finds v2 batches in the registry, and pushes them there.

    The first batch of a pair stays: a server that has built another one uses the first.
    """

    def __init__(
        self, parts: PushParts, *, host: str, now: Callable[[], float] = time.time
    ) -> None:
        super().__init__(parts, host=host, others=True)
        self._now = now
        self._rows: ExpiringMap[tuple[DeltaKey, str], DeltaRow] = ExpiringMap(
            _KEPT, parts.clock.seconds
        )
        self._reading: SingleFlight[tuple[DeltaKey, str], DeltaRow | str] = SingleFlight()

    async def batch(
        self, key: DeltaKey, repository: str, is_wanted: Callable[[DeltaRow], bool]
    ) -> DeltaRow | None:
        """Returns the batch of a pair in its target repository, None if it is missing or not
        wanted. Raises the registry's errors.

        The row's sizes of a full pull and its base's repository are not known.
        """
        row = self._rows.get((key, repository))
        if row is not None and is_wanted(row):
            return row
        try:
            found = await self._read(key, repository)
        except Missing:
            return None
        return found if isinstance(found, DeltaRow) and is_wanted(found) else None

    async def _read(self, key: DeltaKey, repository: str) -> DeltaRow | str:
        """Returns the batch behind a pair's tag, or the reason why it is not the pair's."""

        async def read() -> DeltaRow | str:
            tag = batch_tag(key)
            manifest = await self._upstream.manifest(repository, tag, self._credentials)
            if not isinstance(manifest, Manifest):
                return "it is an index"
            found = _row(manifest, key, repository, int(self._now()))
            if isinstance(found, DeltaRow):
                self._rows.set((key, repository), found, FOUND_SECONDS)
            return found

        return await self._reading.do((key, repository), read)

    def _tag(self, pair: Pair) -> str:
        return batch_tag(pair.key)

    async def _found_there(self, pair: Pair, name: Reference) -> Ready | str:
        found = await self._read(pair.key, name.repository)
        if isinstance(found, str):
            return found
        layer = Descriptor(BATCH_TYPE, found.content, found.delta_bytes)
        if not await self._pusher.has_blob(name.repository, layer, self._credentials):
            return f"its batch {found.content} is gone"
        row = replace(found, base_repository=pair.base.repository, full_bytes=pair.full_bytes)
        return Ready(pair, row)

    def _published(self, pair: Pair, name: Reference, row: DeltaRow) -> Ready:
        return Ready(pair, row)

    async def _send(self, pair: Pair, row: DeltaRow, tag: str) -> PushResult:
        repository = pair.target.repository
        manifest = batch_manifest(row)
        try:
            with self._blobs.pin(row.content), self._blobs.pin(manifest.config.digest):
                await self._blobs.put(EMPTY_CONFIG)
                return await self._pusher.push(
                    repository,
                    tag,
                    manifest,
                    self._blobs.path,
                    self._credentials,
                    mount_from=[row.target_repository] * (row.target_repository != repository),
                )
        finally:
            await self._blobs.remove(manifest.config.digest)


def _row(manifest: Manifest, key: DeltaKey, repository: str, created: int) -> DeltaRow | str:
    """Returns the batch that an artifact holds, or the reason why it is not the pair's."""
    value = load_json(manifest.raw, f"artifact in {repository}")
    annotations = value.get("annotations")
    if not isinstance(annotations, dict) or value.get("artifactType") != ARTIFACT_TYPE:
        return "it is no batch"
    if [layer.media_type for layer in manifest.layers] != [BATCH_TYPE]:
        return "it does not consist of one batch"
    if annotations.get(_BASE) != str(key.base):
        return "it starts from another base"
    if annotations.get(_TARGET) != str(key.target):
        return "it leads to another target"
    if annotations.get(_RECIPE) != str(key.recipe):
        return "it was built by another recipe"
    (layer,) = manifest.layers
    tail = _number(annotations.get(_TAIL), layer.size - BEFORE_DONES)
    sent = _number(annotations.get(_SENT), _MAX_INDEX)
    if tail is None or (sent is None and _SENT in annotations):
        return "its annotations are not readable"
    return DeltaRow(
        key,
        base_repository="",
        target_repository=repository,
        tag=None,
        content=layer.digest,
        full_bytes=0,
        delta_bytes=layer.size,
        seconds=0.0,
        created=created,
        details={"tail": tail, "sent_index": sent},
    )


def _number(value: Any, most: int) -> int | None:
    """Returns a whole number in an annotation, None if it is none or over ``most``."""
    if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 18:
        return None
    return int(value) if int(value) <= most else None
