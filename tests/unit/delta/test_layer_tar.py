"""Copies of shared layers: applied by Debian's rdiff and by our own patcher."""

from __future__ import annotations

import gzip
import random
import subprocess
from pathlib import Path

import pytest

from obdelta.delta.apply import prove_layer
from obdelta.delta.layer_tar import layer_copies
from obdelta.oci import DiffID, Digest
from tests.support import delta_reference as reference
from tests.support.delta import layer_file, stream_of

SIZES = [0, 1024, 64, 65_536, 65_535, 300_000, 1024, 0]


def test_each_copy_gives_its_layer(tmp_path: Path) -> None:
    rng = random.Random(1)
    contents = [rng.randbytes(size) for size in SIZES]
    contents[6] = contents[1]
    base = [layer_file(content, tmp_path) for content in contents]
    whole = tmp_path / "base"
    whole.write_bytes(b"".join(contents))
    copies = layer_copies((layer.diff_id, layer.size) for layer in base)
    for number, (copy, content) in enumerate(zip(copies, contents, strict=True)):
        blob, stream, made = (tmp_path / f"{number}.{kind}" for kind in ("blob", "stream", "made"))
        blob.write_bytes(copy.content)
        assert copy.layer.digest == Digest.of(copy.content)
        assert copy.layer.size == len(copy.content)
        assert copy.layer.diff_id == DiffID.of(gzip.decompress(copy.content))
        assert copy.layer.target == base[number].diff_id
        prove_layer(base, blob, base[number].diff_id)
        stream.write_bytes(stream_of(copy.content))
        subprocess.run(["rdiff", "patch", whole, stream, made], check=True)
        assert made.read_bytes() == content
    assert copies[1] == copies[6]  # the same layer, the same blob: engines download it once
    assert copies[0] == copies[7]


@pytest.mark.parametrize("size", [1024, 5_000_000, 3_000_000_000, 2**40])
def test_a_copy_is_small_however_large_the_layer(size: int) -> None:
    first, second = layer_copies([(DiffID.of(b"first"), size), (DiffID.of(b"second"), size)])
    assert list(reference.decode(stream_of(second.content))) == [reference.Command(size, size)]
    assert list(reference.decode(stream_of(first.content))) == [reference.Command(size, 0)]
    assert max(first.layer.size, second.layer.size) <= 89


def test_the_same_layers_give_the_same_bytes() -> None:
    base = [(DiffID.of(b"first"), 10_240), (DiffID.of(b"second"), 1024)]
    assert layer_copies(base) == layer_copies(base)
    assert layer_copies([]) == []
