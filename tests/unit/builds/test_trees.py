"""Trees of images that cost more than they are worth: limited by the bytes of their layers, and
not tried twice.

The workers, the catalogue and the caches are real. The importer is a double in one respect: it has
the layers on disk already.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from bench.images import Image
from obdelta.builds.inputs import work_limits
from obdelta.builds.inputs.image_lookup import ImageLayer
from obdelta.builds.inputs.layer_inputs import LayerImporter
from obdelta.builds.inputs.tree_inputs import TreeMaker
from obdelta.errors import LayerInvalid, WorkTooLong
from obdelta.oci import Descriptor, Digest
from obdelta.oci.manifest import OCI_LAYER
from obdelta.processes.worker_pool import WorkerPool
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import PinnedLayer, TreeCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.failure_records import MEMORY_SECONDS
from tests.support import rootfs
from tests.support.store import real_threads
from tests.support.web import reactor

GIB = 1 << 30


class _Unpinned:
    def release(self) -> None:
        pass


class ReadyLayers(LayerImporter):
    """Gives the uncompressed layers of an image."""

    def __init__(self, image: Image, **parts: Any) -> None:
        super().__init__(upstream=None, cache=None, max_layer=GIB, max_image=32 * GIB, **parts)  # type: ignore[arg-type]
        self._image = image
        self.imports = 0

    @property
    def wanted(self) -> list[ImageLayer]:
        return [
            ImageLayer(
                "r",
                Descriptor(OCI_LAYER, Digest(layer.diff_id.hex), layer.path.stat().st_size),
                layer.diff_id,
            )
            for layer in self._image.layers
        ]

    async def are_known(self, layers: Iterable[ImageLayer]) -> bool:
        return True

    async def admit(self, layers: Iterable[ImageLayer], credentials: Credentials) -> None:
        pass

    async def ensure_all(self, *_: Any, **__: Any) -> list[PinnedLayer]:
        self.imports += 1
        return [
            PinnedLayer(layer.diff_id, layer.path, layer.path.stat().st_size, _Unpinned())  # type: ignore[arg-type]
            for layer in self._image.layers
        ]


class Place:
    """The parts that make a tree; ``now`` is the time of day."""

    def __init__(self, maker: TreeMaker, importer: ReadyLayers) -> None:
        self.maker, self.importer = maker, importer
        self.now = 1_000_000.0

    async def ensure(self) -> None:
        """Makes the tree, or raises the error."""
        (await self.maker.ensure(self.importer.wanted, Credentials.anonymous())).release()


@asynccontextmanager
async def place(tmp_path: Path, image: Image) -> AsyncIterator[Place]:
    tmp_path.mkdir()
    (tmp_path / "state/tmp").mkdir(parents=True)
    with real_threads() as threads:
        catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
        pool = WorkerPool(reactor, 1)
        blobs = BlobStore(tmp_path / "state", threads)
        importer = ReadyLayers(image, blobs=blobs, catalogue=catalogue, pool=pool, job_seconds=1800)
        cache = await TreeCache.open(tmp_path / "state", threads)
        maker = TreeMaker(
            importer=importer,
            cache=cache,
            blobs=blobs,
            pool=pool,
            job_seconds=1800,
            catalogue=catalogue,
            now=lambda: made.now,
        )
        made = Place(maker, importer)
        try:
            yield made
        finally:
            await pool.close()
            await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_holes_of_sparse_files_count_as_bytes(tmp_path: Path) -> None:
    """A layer of a few hundred bytes cannot hold gigabytes of zeros; within its limit, holes are
    fine.
    """
    many = rootfs.image([[rootfs.sparse("hole", 2 * GIB, [(0, b"x")])]], tmp_path / "many")
    assert many.layers[0].path.stat().st_size < 8192
    async with place(tmp_path / "1", many) as made:
        with pytest.raises(LayerInvalid, match="holes included"):
            await made.ensure()
    few = rootfs.image([[rootfs.sparse("hole", 60_000_000, [(0, b"x")])]], tmp_path / "few")
    async with place(tmp_path / "2", few) as made:
        await made.ensure()


@pytest_twisted.ensureDeferred
async def test_a_tree_that_takes_too_long_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = rootfs.image(
        [[rootfs.file(f"{number}") for number in range(20_000)]], tmp_path / "image"
    )
    async with place(tmp_path / "place", image) as made:
        with monkeypatch.context() as patch:
            patch.setattr(work_limits, "FLOOR_SECONDS", 0.0)
            patch.setattr(work_limits, "SECONDS_PER_MB", 0.0)
            with pytest.raises(WorkTooLong, match="more than 0 seconds"):
                await made.ensure()
        with pytest.raises(WorkTooLong, match="more than 0 seconds"):
            await made.ensure()
        assert made.importer.imports == 1
        made.now += MEMORY_SECONDS + 1
        await made.ensure()
        assert made.importer.imports == 2


def test_a_deadline_grows_with_the_bytes() -> None:
    assert work_limits.work_seconds(0, 1800) == 60
    assert work_limits.work_seconds(100_000_000, 1800) == 260
    assert work_limits.work_seconds(10_000_000_000, 1800) == 1800
