"""Importing layers: gzip, zstd and plain blobs, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from obdelta.delta.inflate import CHUNK, import_layer
from obdelta.errors import LayerInvalid
from obdelta.oci import DiffID
from tests.support.delta import File, tar_of

RANDOM = random.Random(7)
TAR = tar_of(
    [
        File("a", RANDOM.randbytes(300_000)),
        File("b", b"text " * 900_000),
        File("c/" * 90 + "d", b"x"),
    ]
)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def zstd_without_size(content: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(content) + stream.flush()


def members(content: bytes, size: int) -> bytes:
    """Compresses to gzip: a member for each ``size`` bytes, and an empty one at the end."""
    return b"".join(
        gzip.compress(content[at : at + size], 1) for at in range(0, len(content), size)
    ) + gzip.compress(b"")


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
WHOLE = {
    "plain": TAR,
    "gzip": gzip.compress(TAR),
    "gzip, stored": gzip.compress(TAR, 0),
    "gzip, many members": members(TAR, 100_001),
    "gzip with a name": b"\x1f\x8b\x08\x08\0\0\0\0\0\xffname\0" + gzip.compress(TAR)[10:],
    "zstd": zstd(TAR),
    "zstd without its size": zstd_without_size(TAR),
    "zstd, a skippable frame first": SKIPPABLE + zstd(TAR),
    "zstd, as pzstd writes it": b"".join(
        SKIPPABLE + zstd(TAR[at : at + 900_000]) for at in range(0, len(TAR), 900_000)
    ),
    "zstd, an empty skippable frame of another number first": b"\x5f\x2a\x4d\x18\0\0\0\0"
    + zstd(TAR),
    "bzip2": bz2.compress(TAR),
    "bzip2, as pbzip2 writes it": bz2.compress(TAR[:500_000]) + bz2.compress(TAR[500_000:], 1),
    "zstd, two frames and a skippable one": zstd(TAR[:5000])
    + SKIPPABLE
    + zstd(TAR[5000:])
    + SKIPPABLE,
}


class Trickle(io.BytesIO):
    """Gives seven bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(7)


@pytest.mark.parametrize("kind", WHOLE)
def test_complete_layers_are_inflated(kind: str, tmp_path: Path) -> None:
    blob, out = WHOLE[kind], tmp_path / "out"
    source = tmp_path / "blob"
    source.write_bytes(blob)
    seen: list[int] = []
    imported = import_layer(source, out, limit=len(TAR), progress=seen.append)
    assert out.read_bytes() == TAR
    assert imported == (len(blob), DiffID.of(TAR), len(TAR))
    assert seen == sorted(seen)
    assert seen[-1] == len(TAR)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_layer_is_inflated_while_it_is_written(kind: str, tmp_path: Path) -> None:
    blob, out, source = WHOLE[kind], tmp_path / "out", tmp_path / "blob"
    with source.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        importing = pool.submit(import_layer, source, out, limit=len(TAR), final_size=len(blob))
        for start in range(0, len(blob), 1 + len(blob) // 50):
            assert not importing.done()
            file.write(blob[start : start + 1 + len(blob) // 50])
        assert importing.result() == (len(blob), DiffID.of(TAR), len(TAR))
    assert out.read_bytes() == TAR


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "plain"])
def test_a_layer_is_inflated_in_small_pieces(kind: str, tmp_path: Path) -> None:
    tar = tar_of([File("a", b"hello" * 1000)])
    blob = {
        "gzip": gzip.compress(tar),
        "zstd": SKIPPABLE + zstd(tar),
        "bzip2": bz2.compress(tar),
        "plain": tar,
    }[kind]
    imported = import_layer(Trickle(blob), tmp_path / "out", limit=1 << 20)
    if kind == "plain":
        assert imported.diff_id == DiffID.of(tar)
    assert (tmp_path / "out").read_bytes() == tar


def cut(blob: bytes) -> bytes:
    return blob[:-5]


def flipped(blob: bytes) -> bytes:
    return (
        blob[: len(blob) // 2] + bytes([blob[len(blob) // 2] ^ 0x10]) + blob[len(blob) // 2 + 1 :]
    )


BROKEN = {
    "gzip, truncated": (cut(gzip.compress(TAR)), "truncated"),
    "gzip, truncated in its header": (gzip.compress(TAR)[:6], "truncated"),
    "gzip, truncated at a member": (members(TAR, 100_001)[:-3], "truncated"),
    "gzip, damaged": (flipped(gzip.compress(TAR)), "damaged"),
    "gzip, wrong checksum": (
        gzip.compress(TAR)[:-8] + bytes(4) + gzip.compress(TAR)[-4:],
        "damaged",
    ),
    "gzip, junk behind": (gzip.compress(TAR) + b"junk", "damaged|truncated"),
    "gzip, zeros behind": (gzip.compress(TAR) + bytes(100), "damaged"),
    "zstd, truncated": (cut(zstd(TAR)), "truncated"),
    "zstd, damaged": (flipped(zstd(TAR)), "damaged"),
    "zstd, junk behind": (zstd(TAR) + b"junk", "damaged|truncated"),
    "bzip2, truncated": (cut(bz2.compress(TAR)), "truncated"),
    "bzip2, damaged": (flipped(bz2.compress(TAR)), "damaged"),
    "bzip2, junk behind": (bz2.compress(TAR) + b"junk", "damaged|truncated"),
    "zstd, a skippable frame, truncated": (SKIPPABLE[:9], "truncated"),
    "zstd, a skippable frame, then junk": (SKIPPABLE + b"junk and more", "damaged|truncated"),
    "xz": (b"\xfd7zXZ\0", "xz"),
    "zlib": (zlib.compress(TAR), "not a tar"),
    "not a tar": (gzip.compress(b"hello" * 1000), "not a tar"),
    "not a tar, zstd": (zstd(b"hello" * 1000), "not a tar"),
    "a tar that ends early": (gzip.compress(TAR[:4000]), "in the middle"),
    "a tar and something else": (
        gzip.compress(tar_of([File("a", b"b")])[:1024] + b"x" * 512),
        "not a tar",
    ),
    "a page that a proxy sent": (b"<html>403</html>" * 100, "not a tar"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_layers_are_refused(kind: str, tmp_path: Path) -> None:
    blob, why = BROKEN[kind]
    with pytest.raises(LayerInvalid, match=why):
        import_layer(io.BytesIO(blob), tmp_path / "out", limit=1 << 30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tar", [bytes(1024), bytes(10240), TAR + bytes(5000), TAR[: len(TAR) // 512 * 512 - 512]]
)
def test_tars_that_engines_accept_are_accepted(tar: bytes, tmp_path: Path) -> None:
    """The tar is empty, has more zeros than needed, or fewer."""
    assert import_layer(
        io.BytesIO(gzip.compress(tar)), tmp_path / "out", limit=1 << 30
    ).diff_id == DiffID.of(tar)


EMPTY = {
    "no bytes": b"",
    "gzip": gzip.compress(b""),
    "bzip2": bz2.compress(b""),
    "zstd": zstd(b""),
    "zstd, a skippable frame alone": SKIPPABLE,
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_file_is_an_empty_layer(kind: str, tmp_path: Path) -> None:
    """As in engines, the inflated content decides."""
    imported = import_layer(io.BytesIO(EMPTY[kind]), tmp_path / "out", limit=1 << 20)
    assert imported == (len(EMPTY[kind]), DiffID.of(b""), 0)


def zstd_bomb() -> bytes:
    """Returns run-length blocks of 128 KB, four bytes each."""
    frame = zstandard.ZstdCompressor(
        level=1, write_checksum=False, write_content_size=False
    ).compressobj()
    head = frame.compress(b"") + frame.flush()
    magic, descriptor = head[:4], bytes([0x00, 0x38])  # window of 128 KB, no size, no checksum
    block = ((128 * 1024 << 3) | 1 << 1).to_bytes(3, "little") + b"\0"
    return magic + descriptor + block * 60_000


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_bombs_are_stopped_in_little_memory(kind: str, tmp_path: Path) -> None:
    """Bombs of some GB: the limit bounds the inflated bytes, and chunks bound the memory."""
    blob = members(bytes(64 << 20), 64 << 20) * 100 if kind == "gzip" else zstd_bomb()
    limit = 20 * CHUNK
    tracemalloc.start()
    with pytest.raises(LayerInvalid, match=f"more than {limit} bytes"):
        import_layer(io.BytesIO(blob), tmp_path / "out", limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20
    assert list(tmp_path.iterdir()) == []


def test_the_size_limit_is_exact(tmp_path: Path) -> None:
    blob = gzip.compress(TAR)
    with pytest.raises(LayerInvalid, match="more than"):
        import_layer(io.BytesIO(blob), tmp_path / "out", limit=len(TAR) - 1)
    assert import_layer(io.BytesIO(blob), tmp_path / "out", limit=len(TAR)).size == len(TAR)


def test_a_disk_error_is_not_a_layer_error(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        import_layer(io.BytesIO(gzip.compress(TAR)), full, limit=1 << 30)
    assert list(tmp_path.iterdir()) == []
