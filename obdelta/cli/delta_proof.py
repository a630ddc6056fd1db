"""Proof of stored delta images: applies them to their bases as a device does.
Only reads the store.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from obdelta.app.components import open_components
from obdelta.app.runtime import Runtime
from obdelta.builds.inputs.image_lookup import ImageLayer, ImageLookup, ResolvedImage, image_layers
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.cli.terminal import Line
from obdelta.concurrency.tasks import Threads
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL
from obdelta.delta.kernel.binding import LayerFile
from obdelta.device.layer_check import check_patched, check_shared
from obdelta.device.update import labels_of
from obdelta.errors import (
    Broken,
    DigestMismatch,
    ManifestInvalid,
    ObdeltaError,
    UpstreamUnavailable,
)
from obdelta.oci import (
    DiffID,
    ImageConfig,
    Manifest,
    Reference,
    common_prefix,
    parse_config,
    parse_manifest,
)
from obdelta.registry import Credentials, Upstream
from obdelta.store.audit import Inventory, blob_path
from obdelta.store.catalogue.records import DeltaRow


@dataclass(frozen=True, slots=True)
class Proof:
    """``problem`` None: the delta leads to its target. ``unproven``: the base is not available,
    which is the problem.
    """

    problem: str | None = None
    unproven: bool = False


async def prove(
    runtime: Runtime,
    state_dir: Path,
    inventory: Inventory,
    rows: Sequence[DeltaRow],
    line: Line,
    *,
    fetch: bool,
) -> list[tuple[DeltaRow, Proof]]:
    """Proves rows of the store in ``state_dir``, base by base. The
    runtime has another ``state-dir``, for fetched blobs.
    """
    parts = await open_components(runtime)
    bases = _BaseSource(
        parts.upstream,
        parts.policy.credentials(None),
        parts.lookup,
        parts.importer if fetch else None,
        parts.threads,
        state_dir,
    )
    by_base: defaultdict[tuple[str, str], list[DeltaRow]] = defaultdict(list)
    for row in rows:
        by_base[row.base_repository, row.key.base.hex].append(row)
    found: list[tuple[DeltaRow, Proof]] = []
    unavailable_bases: UpstreamUnavailable | None = None
    over = False

    def proven(part: float) -> None:
        if over:  # a thread cannot be cancelled: this ends it at the next layer
            raise CancelledError
        line.show(f"proving {len(found) + 1} of {len(rows)}", (len(found) + part) / len(rows))

    async def ended() -> None:
        nonlocal over
        over = True

    parts.services.add_stop(ended)
    for group in by_base.values():
        line.show(f"proving {len(found) + 1} of {len(rows)}", len(found) / len(rows))
        with ExitStack() as pins:
            try:
                if unavailable_bases is not None:
                    # The request was already retried. Retries for each base would take too long.
                    raise unavailable_bases
                config, layers = await bases.base(group[0], pins)
            except (ObdeltaError, OSError) as error:
                unavailable_bases = error if isinstance(error, UpstreamUnavailable) else None
                found += [
                    (row, Proof(f"its base is unavailable: {error}", unproven=True))
                    for row in group
                ]
                continue
            for row in group:
                found.append(
                    (
                        row,
                        await parts.threads.run(
                            _proof, row, inventory, state_dir, config, layers, proven
                        ),
                    )
                )
    return found


@dataclass(frozen=True, slots=True)
class _BaseSource:
    """Finds bases. ``importer`` None: nothing is fetched but manifests and configs."""

    upstream: Upstream
    credentials: Credentials
    lookup: ImageLookup
    importer: LayerImporter | None
    threads: Threads
    state_dir: Path

    async def base(self, row: DeltaRow, pins: ExitStack) -> tuple[ImageConfig, list[LayerFile]]:
        """Returns config and layers, bottom to top, of a row's base. They stay until ``pins`` is
        closed.
        """
        name = Reference("", row.base_repository, digest=row.key.base)
        image: ResolvedImage = await self.lookup.resolve(name, self.credentials)
        config = await image.config(self.upstream, self.credentials)
        known: dict[DiffID, LayerFile] = {}
        for wanted in image_layers(image, config):
            if wanted.diff_id not in known:
                known[wanted.diff_id] = await self._layer(wanted, pins)
        return config, [known[diff_id] for diff_id in config.diff_ids]

    async def _layer(self, wanted: ImageLayer, pins: ExitStack) -> LayerFile:
        cached = self.state_dir / "layers" / f"{wanted.diff_id.hex}.tar"
        found = await self.threads.run(_cached, cached, wanted.diff_id)
        if found is not None:
            return found
        if self.importer is None:
            raise UpstreamUnavailable(
                f"layer {wanted.diff_id} is not in the cache, and nothing is fetched (--no-fetch)"
            )
        pinned = pins.enter_context(await self.importer.ensure(wanted, self.credentials))
        return LayerFile(pinned.diff_id, pinned.path, pinned.size)


def _cached(path: Path, diff_id: DiffID) -> LayerFile | None:
    """Returns a layer of the store's cache, None if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            actual = DiffID(hashlib.file_digest(file, "sha256").hexdigest())
            return LayerFile(diff_id, path, file.tell()) if actual == diff_id else None
    except FileNotFoundError:
        return None


def _proof(
    row: DeltaRow,
    inventory: Inventory,
    state_dir: Path,
    base: ImageConfig,
    layers: Sequence[LayerFile],
    proven: Callable[[float], None],
) -> Proof:
    try:
        _check(row, inventory, state_dir, base, layers, proven)
    except Broken as error:
        return Proof(str(error))
    except FileNotFoundError as error:
        return Proof(f"it was removed during the check: {Path(error.filename).name}", unproven=True)
    return Proof()


def _check(
    row: DeltaRow,
    inventory: Inventory,
    state_dir: Path,
    base: ImageConfig,
    layers: Sequence[LayerFile],
    proven: Callable[[float], None],
) -> None:
    """Raises Broken if the delta does not turn its base into its target. ``proven`` gets the
    share of layers done.
    """
    media_type, raw = inventory.manifests[row.content]
    manifest = parse_manifest(raw, media_type, "the delta's manifest")
    if not isinstance(manifest, Manifest):
        raise ManifestInvalid("the delta's manifest", "it should be one image")
    if manifest.digest != row.content:
        raise DigestMismatch(row.content, manifest.digest, "the delta's manifest")
    config = parse_config(
        blob_path(state_dir, manifest.config.digest).read_bytes(), "the delta's config"
    )
    labels = labels_of(config)
    if labels.get(BASE_LABEL) != str(base.image_id):
        raise DigestMismatch(base.image_id, labels.get(BASE_LABEL), f"label {BASE_LABEL}")
    target = parse_config(labels.get(CONFIG_LABEL, "").encode("utf-8"), f"label {CONFIG_LABEL}")
    if not len(manifest.layers) == len(config.diff_ids) == len(target.diff_ids):
        raise ManifestInvalid(
            "the delta's manifest", "it does not have a layer for each of the target"
        )
    shared = common_prefix(base.diff_ids, target.diff_ids)
    for number, (blob, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True)):
        proven(number / len(manifest.layers))
        path = blob_path(state_dir, blob.digest)
        if number < shared:
            check_shared(layers, path, diff_id, target.diff_ids[number])
        else:
            check_patched(layers, path, diff_id, target.diff_ids[number])
