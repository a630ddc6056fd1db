"""Hostile layers take no more work than their size and entries justify: unpacking, reading tars,
comparing, inflating.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from isal import isal_zlib

from bench.images import Entry
from obdelta.delta import inflate
from obdelta.delta.build import LayerBuilder, LayerFile
from obdelta.errors import LayerInvalid
from obdelta.oci import DiffID, Form
from obdelta.rootfs import bounds, compare, tar
from obdelta.rootfs.unpack import unpack
from obdelta.rsync import proof
from tests.support import rootfs
from tests.support.counting import CountedBytes, calls

Layers = list[list[Entry]]


def again_through_a_link(count: int) -> Layers:
    """Each file is replaced through a symbolic link to its directory."""
    files = [f"{number}" for number in range(count)]
    return [
        [
            rootfs.directory("d"),
            *(rootfs.file(f"d/{name}") for name in files),
            rootfs.symlink("l", "d"),
            *(rootfs.file(f"l/{name}") for name in files),
        ]
    ]


def implied_directories_replaced(count: int) -> Layers:
    """Directories without an entry, with a file in each, are replaced by files."""
    return [
        [
            rootfs.symlink("l", "."),
            *(rootfs.file(f"{number}/x") for number in range(count)),
            *(rootfs.file(f"l/{number}") for number in range(count)),
        ]
    ]


def opaque_marks_through_links(count: int) -> Layers:
    """One directory of many files gets an opaque mark through each of many links."""
    return [
        [
            rootfs.directory("d"),
            *(rootfs.file(f"d/{number}") for number in range(count)),
            *(rootfs.symlink(f"l{number}", "d") for number in range(count)),
            *(rootfs.opaque(f"l{number}") for number in range(count)),
        ]
    ]


def nested_opaque_marks(count: int) -> Layers:
    """Each directory on a long path to many files has an opaque mark, the outermost first."""
    names = ["d"] * 100
    deep = "/".join(names)
    return [
        [
            *(rootfs.file(f"{deep}/{number}") for number in range(count)),
            *(rootfs.opaque("/".join(names[:depth])) for depth in range(1, 101)),
        ]
    ]


def whiteouts_and_files(count: int) -> Layers:
    """A lower layer's files are hidden, and reachable again through a link."""
    return [
        [rootfs.directory("d"), *(rootfs.file(f"d/{number}") for number in range(count))],
        [
            rootfs.symlink("l", "d"),
            *(rootfs.whiteout(f"d/{number}") for number in range(count)),
            *(rootfs.file(f"l/{number}") for number in range(count)),
        ],
    ]


def hard_links(count: int) -> Layers:
    """Many names of few inodes are replaced one by one."""
    return [
        [rootfs.file("f", b"x"), *(rootfs.hardlink(f"h{number}", "f") for number in range(count))],
        [rootfs.file(f"h{number}", b"y") for number in range(count)],
    ]


PATTERNS = [
    again_through_a_link,
    implied_directories_replaced,
    opaque_marks_through_links,
    nested_opaque_marks,
    whiteouts_and_files,
    hard_links,
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unpacking_is_linear(pattern: Callable[[int], Layers], tmp_path: Path) -> None:
    counted = []
    for count in (100, 400):
        tars = rootfs.tars(rootfs.image(pattern(count), tmp_path / f"image{count}"))
        out = tmp_path / f"out{count}"
        counted.append(calls(lambda tars=tars, out=out: unpack(tars, out)))  # type: ignore[misc]
    assert counted[1] < 5 * counted[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_comparing_and_copying_are_linear(pattern: Callable[[int], Layers], tmp_path: Path) -> None:
    counted = []
    for count in (100, 400):
        made = rootfs.image(pattern(count), tmp_path / f"image{count}")
        base, target = (
            rootfs.tree(made, tmp_path / f"{name}{count}") for name in ("base", "target")
        )
        copy = tmp_path / f"copy{count}"

        def prove(base: Path = base, target: Path = target, copy: Path = copy) -> None:
            proof.copy_for_proof(base, target, copy)
            assert list(compare.differences(copy, target)) == []

        counted.append(calls(prove))
    assert counted[1] < 5 * counted[0]


def test_links_with_very_long_paths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path to every file has forty links of 2,000 components each."""
    monkeypatch.setattr(bounds, "FLOOR_STEPS", 100_000)
    way = "d/../" * 800
    links = [rootfs.symlink(f"l{number}", f"{way}l{number + 1}") for number in range(38)]
    entries = [
        rootfs.directory("d"),
        *links,
        rootfs.symlink("l38", "d"),
        *(rootfs.file(f"l0/{number}") for number in range(2000)),
    ]
    tars = rootfs.tars(rootfs.image([entries], tmp_path / "image"))

    def refused() -> None:
        with pytest.raises(LayerInvalid, match="too much work"):
            unpack(tars, tmp_path / "out")

    # Each step takes a few calls.
    assert calls(refused) < 10 * bounds.FLOOR_STEPS


def test_directories_without_entries_are_bounded(tmp_path: Path) -> None:
    """One path of 200 bytes implies 100 directories; real images list most of theirs."""
    deep = "/d" * 100
    entries = [rootfs.file(f"{number}{deep}/f") for number in range(110)]
    tars = rootfs.tars(rootfs.image([entries], tmp_path / "image"))
    with pytest.raises(LayerInvalid, match="too many directories without an entry"):
        unpack(tars, tmp_path / "out")


def test_names_that_go_up_are_read_in_linear_time(tmp_path: Path) -> None:
    """A name may have 1 MiB: every ``..`` in it costs the same."""
    copied = []
    for count in (10_000, 40_000):
        made = rootfs.image([[rootfs.file("../" * count + "x", b"1")]], tmp_path / f"image{count}")
        copied.append(
            calls(lambda made=made, count=count: rootfs.tree(made, tmp_path / f"out{count}"))  # type: ignore[misc]
        )
        assert (tmp_path / f"out{count}/root/x").read_bytes() == b"1"
    assert copied[1] < 5 * copied[0]


def read(path: Path) -> list[tar.Member]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(tar.members(descriptor, "the test's"))
    finally:
        os.close(descriptor)


def with_records(path: Path, records: bytes) -> Path:
    """Returns a layer of one file, after a pax header with these records."""
    head = rootfs.file("pax").info
    head.type, head.size = b"x", len(records)
    path.write_bytes(
        head.tobuf()
        + records
        + bytes(-len(records) % 512)
        + rootfs.file("x").info.tobuf()
        + bytes(1024)
    )
    return path


def test_pax_records_are_cut_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 1 MiB may hold 65,000 records of 16 bytes; this one has an eighth of that."""
    records = b"16 comment=abcd\n" * (tar.MAX_EXTENDED // 128)
    counted: list[CountedBytes] = []
    extended = tar._Reader.extended

    def counting(reader: tar._Reader, size: int) -> bytes:
        counted.append(CountedBytes.of(extended(reader, size)))
        return counted[-1]

    monkeypatch.setattr(tar._Reader, "extended", counting)
    (member,) = read(with_records(tmp_path / "layer.tar", records))
    assert member.name == b"x"
    assert counted[0].copied[0] < 8 * len(records)


def test_more_pax_records_than_any_writer_makes_are_refused_at_once(tmp_path: Path) -> None:
    """A MiB of records of 6 bytes costs no more than the first thousands of them."""
    path = with_records(tmp_path / "layer.tar", b"6 a=b\n" * (tar.MAX_EXTENDED // 6))

    def refused() -> None:
        with pytest.raises(LayerInvalid, match="less than 16 bytes on average"):
            read(path)

    assert calls(refused) < 20 * tar.RECORDS


@pytest.mark.parametrize("pieces", [tar.EXTENTS, 3 * tar.EXTENTS])
def test_sparse_files_in_pieces_smaller_than_any_hole_are_refused(
    pieces: int, tmp_path: Path
) -> None:
    """The map states the number of its pieces, so the rest of it is not read."""
    entry = rootfs.sparse("f", 8 * pieces + 1, [(8 * number, b"x") for number in range(pieces)])
    ((_, path),) = rootfs.tars(rootfs.image([[entry]], tmp_path / "image"))

    def refused() -> None:
        with pytest.raises(LayerInvalid, match="too many pieces"):
            read(path)

    if pieces > tar.EXTENTS:
        assert calls(refused) < 1_000
    else:
        assert len(read(path)[0].extents) == pieces


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"]
)
def test_tiny_members_cost_linear_work(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes after a member in the piece that was read are not copied for each member."""
    fed: list[int] = []
    taken: list[int] = []

    def view(piece: bytes) -> memoryview:
        taken.append(len(piece))
        return memoryview(piece)

    monkeypatch.setattr(inflate, "memoryview", view, raising=False)

    class Counted:
        """A decompressor that counts its input."""

        def __init__(self, real: object) -> None:
            self._real = real

        def decompress(self, part: bytes, *most: int) -> bytes:
            fed.append(len(part))
            return self._real.decompress(part, *most)  # type: ignore[attr-defined,no-any-return]

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

    gzipped, zstd = isal_zlib.decompressobj, zstandard.ZstdDecompressor
    monkeypatch.setattr(isal_zlib, "decompressobj", lambda wbits: Counted(gzipped(wbits=wbits)))

    class Decompressor:
        def __init__(self, **given: Any) -> None:
            self._real = zstd(**given)

        def decompressobj(self) -> Counted:
            return Counted(self._real.decompressobj())

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    chance = random.Random(7)
    parts = [chance.randbytes(chance.choice([0, 0, 1, 1100])) for _ in range(20_000)]
    parts = [chance.randbytes(1 << 20), *parts]
    blob = b"".join(map(compress, parts))
    chunks = list(inflate.inflated(inflate.CountedReader(io.BytesIO(blob))))
    assert b"".join(chunks) == b"".join(parts)
    # Each chunk costs the hashing and writing thread one turn.
    assert len(chunks) < 2 * len(b"".join(parts)) / inflate.GATHERED
    assert sum(fed) < 2100 * len(parts)
    assert sum(taken) <= 2 * len(blob)


@pytest.mark.parametrize(
    ("compress", "minimum"),
    [
        (gzip.compress, inflate.MEMBER_BYTES),
        (zstandard.ZstdCompressor().compress, inflate.MEMBER_BYTES),
        (bz2.compress, inflate.STREAM_BYTES),
    ],
    ids=["gzip", "zstd", "bzip2"],
)
@pytest.mark.parametrize("each", [0, 100])
def test_smaller_members_than_any_writer_makes_are_refused_at_once(
    each: int, compress: Callable[[bytes], bytes], minimum: int
) -> None:
    """A blob of many tiny members costs no more than its first ones."""
    member = compress(bytes(each))
    blob = io.BytesIO(member * 10 * inflate.MEMBERS)
    with pytest.raises(LayerInvalid, match=f"less than {minimum} bytes on average"):
        list(inflate.inflated(inflate.CountedReader(blob)))
    assert blob.tell() <= 2 * inflate.MEMBERS * len(member) + inflate.READ
    whole = io.BytesIO(member * inflate.MEMBERS)
    chunks = inflate.inflated(inflate.CountedReader(whole))
    assert sum(map(len, chunks)) == each * inflate.MEMBERS


def test_layers_of_the_base_take_little_memory_each(tmp_path: Path) -> None:
    """An image may have 120 such layers, with a few bytes each."""
    path = tmp_path / "layer.tar"
    path.write_bytes(bytes(1024))
    layer = LayerFile(DiffID.of(bytes(1024)), path, 1024)
    with LayerBuilder([layer]) as builder:
        builder.build(layer.diff_id, {Form.GZIP: tmp_path / "first"})  # starts threads
        tracemalloc.start()
        builder.build(layer.diff_id, {Form.GZIP: tmp_path / "second"})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
