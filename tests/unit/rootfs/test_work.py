"""Hostile layers do not cost more than their size and entries are worth: unpacking, reading tars,
comparing, inflating.
"""

from __future__ import annotations

import gzip
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from isal import isal_zlib

from bench.images import Entry
from obdelta.delta import inflate
from obdelta.errors import LayerInvalid
from obdelta.rootfs import apply_layer, compare, tar
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
    """Each directory on a long way to many files has an opaque mark, the outermost first."""
    names = ["d"] * 100
    deep = "/".join(names)
    return [
        [
            *(rootfs.file(f"{deep}/{number}") for number in range(count)),
            *(rootfs.opaque("/".join(names[:depth])) for depth in range(1, 101)),
        ]
    ]


def whiteouts_and_files(count: int) -> Layers:
    """What a lower layer has is hidden, and is there again through a link."""
    return [
        [rootfs.directory("d"), *(rootfs.file(f"d/{number}") for number in range(count))],
        [
            rootfs.symlink("l", "d"),
            *(rootfs.whiteout(f"d/{number}") for number in range(count)),
            *(rootfs.file(f"l/{number}") for number in range(count)),
        ],
    ]


def hard_links(count: int) -> Layers:
    """Many names of few inodes, replaced one by one."""
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


def test_links_that_lead_round_long_ways_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty links of 2,000 components each stand on the way to every file."""
    monkeypatch.setattr(apply_layer, "FLOOR_STEPS", 100_000)
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

    # Each step is a few calls.
    assert calls(refused) < 10 * apply_layer.FLOOR_STEPS


def test_directories_without_entries_are_bounded(tmp_path: Path) -> None:
    """One path of 200 bytes implies 100 directories; real images name most of theirs."""
    deep = "/d" * 100
    entries = [rootfs.file(f"{number}{deep}/f") for number in range(110)]
    tars = rootfs.tars(rootfs.image([entries], tmp_path / "image"))
    with pytest.raises(LayerInvalid, match="too many directories without an entry"):
        unpack(tars, tmp_path / "out")


def test_names_that_go_up_are_read_in_linear_time(tmp_path: Path) -> None:
    """A name may have a MiB: every ``..`` in it costs the same."""
    copied = []
    for count in (10_000, 40_000):
        made = rootfs.image([[rootfs.file("../" * count + "x", b"1")]], tmp_path / f"image{count}")
        copied.append(
            calls(lambda made=made, count=count: rootfs.tree(made, tmp_path / f"out{count}"))  # type: ignore[misc]
        )
        assert (tmp_path / f"out{count}/root/x").read_bytes() == b"1"
    assert copied[1] < 5 * copied[0]


def test_pax_records_are_cut_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 1 MiB may hold 170,000 records of 6 bytes; here it has an eighth."""
    records = b"6 a=b\n" * (tar.MAX_EXTENDED // 48)
    info = rootfs.file("x").info
    head = rootfs.file("pax").info
    head.type, head.size = b"x", len(records)
    path = tmp_path / "layer.tar"
    path.write_bytes(
        head.tobuf() + records + bytes(-len(records) % 512) + info.tobuf() + bytes(1024)
    )
    counted: list[CountedBytes] = []
    read = tar._Reader.extended

    def extended(reader: tar._Reader, size: int) -> bytes:
        counted.append(CountedBytes.of(read(reader, size)))
        return counted[-1]

    monkeypatch.setattr(tar._Reader, "extended", extended)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (member,) = tar.members(descriptor, "the test's")
    finally:
        os.close(descriptor)
    assert member.name == b"x"
    assert counted[0].copied[0] < 8 * len(records)


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"]
)
def test_tiny_members_cost_what_they_are(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind a member in the piece that was read is not copied for each member."""
    fed: list[int] = []
    taken: list[int] = []

    def view(piece: bytes) -> memoryview:
        taken.append(len(piece))
        return memoryview(piece)

    monkeypatch.setattr(inflate, "memoryview", view, raising=False)

    class Counted:
        """A decompressor that notes how much it is given."""

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
    parts = [chance.randbytes(chance.choice([0, 0, 1, 30])) for _ in range(20_000)] + [
        chance.randbytes(1 << 20)
    ]
    blob = b"".join(map(compress, parts))
    assert b"".join(inflate.inflated(inflate.CountedReader(io.BytesIO(blob)))) == b"".join(parts)
    assert sum(fed) < 2100 * len(parts)
    assert sum(taken) <= 2 * len(blob)
