"""Kill -9 at any moment leaves nothing half-published."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.oci import Digest, parse_manifest
from obdelta.oci.manifest import DOCKER_MANIFEST, Manifest
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import LayerCache
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow
from tests.support.store import REACTOR, real_threads

ROOT = Path(__file__).resolve().parents[3]


class Victims:
    """The program that forks the processes to kill."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.support.store_crash"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def kill_one(self, seed: int, operation: int, milliseconds: float = 0.0) -> None:
        """Lets one child work on the store and kills it: at its n-th file operation, or (n = 0)
        after some time.
        """
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(f"{self.state} {seed} {operation}\n")
        child = int(self._program.stdout.readline())
        if not operation:
            # The kill may come at any moment, also within SQLite, so no event is waited for.
            select.select([self._program.stdout], [], [], milliseconds / 1000)
            # no other process has this id yet: its parent has not reaped it
            os.kill(child, signal.SIGKILL)
        assert self._program.stdout.readline() == f"ended {-signal.SIGKILL}\n"

    def close(self) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.close()
        self._program.stdout.close()
        self._program.wait(10)


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Victims]:
    running = Victims(tmp_path / "state")
    yield running
    running.close()


async def left_behind(state: Path, blobs: BlobStore) -> tuple[int, int]:
    """Checks the state after a kill, then after a start; returns the numbers of removed
    temporaries and orphans.
    """
    for digest in blobs.digests():
        path = blobs.path(digest)
        assert path is not None
        assert files.digest_of(path) == digest
    for path in (state / "layers").iterdir():
        if path.suffix == ".tar":
            assert files.digest_of(path).hex == path.stem
    catalogue = await Catalogue.open(state / "catalogue.sqlite", REACTOR)
    try:
        needed: set[Digest] = set()
        for row in await catalogue.recent(1000):
            needed |= await _needed(catalogue, blobs, row)
        temporaries = await blobs.sweep()
        retired, orphans = await catalogue.sweep(blobs)
        assert retired == []
        assert set(blobs.digests()) == needed
        assert (await catalogue.totals()).blobs == len(needed)
        assert not list(blobs.tmp.iterdir())
    finally:
        await catalogue.close()
    layers = await LayerCache.open(state, blobs.threads)
    names = {path.name for path in layers.root.iterdir()}
    assert all(f"{name.partition('.')[0]}.tar" in names for name in names)
    return temporaries, orphans


async def _needed(catalogue: Catalogue, blobs: BlobStore, row: DeltaRow) -> set[Digest]:
    """The parts of a visible delta, all of which must be there."""
    if row.key.kind == "v2":
        assert blobs.size(row.content) == row.delta_bytes
        return {row.content}
    found = await catalogue.manifest("v2/target", row.content)
    assert found is not None
    assert Digest.of(found.raw) == row.content
    manifest = parse_manifest(found.raw, DOCKER_MANIFEST)
    assert isinstance(manifest, Manifest)
    for part in (manifest.config, *manifest.layers):
        assert await catalogue.blob("v2/target", part.digest) == part
        assert blobs.size(part.digest) == part.size
    return {part.digest for part in (manifest.config, *manifest.layers)}


@pytest_twisted.ensureDeferred
async def test_a_kill_at_any_moment_leaves_nothing_half_published(
    victims: Victims, tmp_path: Path
) -> None:
    source = random.Random(4)
    found = []
    with real_threads() as threads:
        for index in range(45):
            operation = source.randrange(1, 150) if index % 3 else 0
            victims.kill_one(source.randrange(2**32), operation, source.uniform(0, 120))
            blobs = BlobStore(victims.state, threads)
            found.append(await left_behind(victims.state, blobs))
    temporaries, orphans = [sum(1 for left in found if left[kind]) for kind in (0, 1)]
    print(
        f"{len(found)} kills: {temporaries} left temporaries, {orphans} left files that nothing"
        " referred to"
    )
    assert temporaries > 5
    assert orphans > 5
