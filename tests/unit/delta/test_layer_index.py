"""Indexes kept on disk: used when they are good, rebuilt when they are not, and never trusted."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
import xxhash

from obdelta.delta.build import DeltaLayer, LayerFile, build_layer
from tests.support.delta import File, layer_file, tar_of

RNG = random.Random(3)
OLD = [File(f"d/{i}", RNG.randbytes(RNG.randrange(40_000))) for i in range(30)]
BASE = tar_of(OLD)
TARGET = tar_of(
    [f._replace(content=f.content[:900] + b"edit" + f.content[900:]) for f in OLD[::-1]]
)


@pytest.fixture
def layers(tmp_path: Path) -> tuple[LayerFile, LayerFile]:
    return layer_file(BASE, tmp_path), layer_file(TARGET, tmp_path)


def built(layers: tuple[LayerFile, LayerFile], folder: Path | None) -> DeltaLayer:
    base, target = layers
    return build_layer(
        [base], target, base.path.parent / "out", index_dir=folder, threads=2
    )._replace(seconds={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


def test_an_index_is_built_once_and_used(
    layers: tuple[LayerFile, LayerFile], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = built(layers, None)
    assert built(layers, folder) == expected
    (kept,) = folder.iterdir()
    assert kept.name == f"{layers[0].diff_id.hex}.idx"
    before = (kept.stat().st_mtime_ns, kept.stat().st_ino)
    assert built(layers, folder) == expected
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert caplog.records == []


def damage(content: bytes, kind: str) -> bytes:
    body = bytearray(content)
    match kind:
        case "empty":
            return b""
        case "half":
            return content[: len(content) // 2]
        case "longer":
            return content + b"x"
        case "a bit flipped":
            body[len(body) // 2] ^= 4
        case "of another version":
            body[14] += 1
        case "of another layer":
            body[20] ^= 1
    return bytes(body)


KINDS = ["empty", "half", "longer", "a bit flipped", "of another version", "of another layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unusable_index_is_rebuilt(
    kind: str, layers: tuple[LayerFile, LayerFile], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = built(layers, folder)
    (kept,) = folder.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(damage(good, kind))
    with caplog.at_level(logging.WARNING):
        assert built(layers, folder) == expected
    assert "it is rebuilt" in caplog.text
    assert kept.read_bytes() == good
    assert len(list(folder.iterdir())) == 1


HEADER = 14 + 2 + 32 + 4 * 8 + 16
"""Bytes before those that the checksum covers."""


def test_a_wrong_index_costs_only_bytes(layers: tuple[LayerFile, LayerFile], folder: Path) -> None:
    """With a matching checksum: whatever the index says about positions and contents, the delta is
    proven, and the process survives.
    """
    rng = random.Random(5)
    built(layers, folder)
    (kept,) = folder.iterdir()
    good = kept.read_bytes()
    for _ in range(150):
        body = bytearray(good[HEADER:])
        for _ in range(rng.choice([1, 5, 500])):
            at = rng.choice([rng.randrange(len(body)), rng.randrange(30 * 56)])  # the entries
            body[at] = rng.choice([0, 255, rng.randrange(256)])
        kept.write_bytes(good[: HEADER - 16] + xxhash.xxh3_128(bytes(body)).digest() + bytes(body))
        assert built(layers, folder).target == layers[1].diff_id


def test_an_index_that_cannot_be_written_is_not_needed(
    layers: tuple[LayerFile, LayerFile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = built(layers, None)
    with caplog.at_level(logging.WARNING):
        assert built(layers, tmp_path / "missing") == expected
    assert "was not stored" in caplog.text


def test_two_builds_at_once_leave_one_good_index(
    layers: tuple[LayerFile, LayerFile], folder: Path
) -> None:
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                base, target = layers
                build_layer([base], target, base.path.parent / f"out{number}", index_dir=folder)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list(folder.iterdir())) == 1
    built(layers, folder)
