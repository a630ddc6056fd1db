"""The walk over tars compared with Python's tarfile, and over bytes that are no tar."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.delta.kernel.binding import MappedFile, ffi, lib
from obdelta.delta.tar_index import Entries, Member, check_tar, walk
from obdelta.errors import LayerInvalid
from tests.support.delta import File, tar_of


def members(tar: Any) -> list[Member]:
    entries = Entries(tar)
    return [entries.member(number) for number in range(len(entries))]


def walked(content: bytes, folder: Path) -> tuple[list[Member], int, int]:
    path = folder / "tar"
    path.write_bytes(content)
    file = MappedFile(path)
    try:
        tar = walk(file)
        return members(tar), tar.verdict, tar.stopped
    finally:
        file.close()


NAMES = st.text("abcdefghij/ä", min_size=1, max_size=300).map(lambda name: name.strip("/") or "x")


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_regular_files_are_indexed(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], format: int
) -> None:
    content = tar_of([File(name, data) for name, data in files], format)
    found, verdict, _ = walked(content, tmp_path_factory.mktemp("tar"))
    assert verdict == lib.OD_TAR_END
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = tar.getmembers()
    assert [(m.name.decode(), m.content, m.size) for m in found] == [
        (e.name, e.offset_data, e.size) for e in expected
    ]
    assert [m.start for m in found] == [0, *(m.end for m in found[:-1])][: len(found)]


def test_every_kind_of_entry_is_indexed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in [("d", "5"), ("s", "2"), ("h", "1"), ("c", "3"), ("b", "4"), ("p", "6")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind.encode(), "x" * (150 if kind in "12" else 0)
            info.pax_headers = {"SCHILY.xattr.user.a": "b=c\nd"}
            tar.addfile(info)
    found, verdict, _ = walked(out.getvalue(), tmp_path)
    assert verdict == lib.OD_TAR_END
    assert [(m.name, m.type, m.size) for m in found] == [
        (b"d/", "5", 0),
        (b"s", "2", 0),
        (b"h", "1", 0),
        (b"c", "3", 0),
        (b"b", "4", 0),
        (b"p", "6", 0),
    ]


def header(
    name: bytes = b"f", size: bytes = b"00000000000\0", kind: bytes = b"0", **more: bytes
) -> bytes:
    """Returns one header block; ``more``: fields at offsets ``at123``."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for place, value in more.items():
        block[int(place[2:]) : int(place[2:]) + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_base_256_size_and_prefix(tmp_path: Path) -> None:
    content = (
        header(b"f", b"\x80" + bytes(9) + b"\x02\x01", at345=b"some/prefix")
        + bytes(1024)
        + bytes(1024)
    )
    found, verdict, _ = walked(content, tmp_path)
    assert verdict == lib.OD_TAR_END
    assert found == [Member(0, 512, 513, 1536, b"some/prefix/f", "0")]


def test_gnu_sparse_entries_are_taken_as_they_are_stored(tmp_path: Path) -> None:
    """The map continues in blocks after the header (GNU tar manual, "Sparse Formats")."""
    more = bytearray(512)
    more[504] = 1
    content = (
        header(size=b"00000001000\0", kind=b"S", at482=b"\x01")
        + bytes(more)
        + bytes(512)
        + b"x" * 512
        + bytes(1024)
    )
    found, verdict, _ = walked(content, tmp_path)
    assert verdict == lib.OD_TAR_END
    assert found == [Member(0, 1536, 512, 2048, b"f", "S")]


def test_pax_size_wins(tmp_path: Path) -> None:
    record = b"13 size=1024\n"
    content = (
        header(kind=b"x", size=b"%011o\0" % len(record))
        + record.ljust(512, b"\0")
        + header(b"big", size=b"77777777777\0")
        + b"y" * 1024
        + bytes(1024)
    )
    found, verdict, _ = walked(content, tmp_path)
    assert verdict == lib.OD_TAR_END
    assert found == [Member(0, 1536, 1024, 2560, b"big", "0")]


HOSTILE = {
    "size beyond the end": header(size=b"77777777777\0"),
    "base-256 size of 2^94": header(size=b"\x80\xff" + bytes(10)),
    "negative base-256 size": header(size=b"\xff" * 12),
    "a size that is no number": header(size=b"9999\0"),
    "PAX header that lies about its records": header(kind=b"x", size=b"00000000020\0")
    + b"99999 path=a\n".ljust(512, b"\0"),
    "PAX header and nothing more": header(kind=b"x", size=b"00000000000\0"),
    "PAX size of 20 digits": header(kind=b"x", size=b"00000000040\0")
    + b"32 size=99999999999999999999999\n".ljust(512, b"\0"),
    "sparse map without an end": header(kind=b"S", at482=b"\x01") + b"\x01" * 2048,
    "long name and nothing more": header(kind=b"L", size=b"00000000004\0")
    + b"name".ljust(512, b"\0"),
    "half a block": header() + b"x" * 100,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_are_not_read_beyond_their_end(kind: str, tmp_path: Path) -> None:
    content = HOSTILE[kind]
    found, verdict, stopped = walked(content, tmp_path)
    assert verdict != lib.OD_TAR_END or kind == "PAX size of 20 digits"
    assert 0 <= stopped <= len(content)
    assert all(m.end <= len(content) for m in found)


def test_mutated_tars_give_no_wrong_spans(tmp_path: Path) -> None:
    """Entries stay in order and inside the file, whichever bytes are changed (with a corrected
    checksum of the header).
    """
    rng = random.Random(1)
    plain = tar_of(
        [File(f"{i}" * rng.choice([1, 120]), rng.randbytes(rng.randint(0, 1500))) for i in range(6)]
    )
    buffer = bytearray(plain)
    for _ in range(3000):
        buffer[:] = plain
        for _ in range(rng.randint(1, 4)):
            block = rng.randrange(len(plain) // 512) * 512
            buffer[block + rng.choice([rng.randrange(512), 124 + rng.randrange(12), 156])] = (
                rng.randrange(256)
            )
            buffer[block + 148 : block + 156] = b"        "
            buffer[block + 148 : block + 156] = b"%06o\0 " % (
                sum(buffer[block : block + 512]) & 0o777777
            )
        tar = lib.od_tar_walk(ffi.from_buffer("uint8_t[]", buffer), len(buffer))
        at = 0
        for member in members(tar):
            assert (
                at
                == member.start
                <= member.content
                <= member.content + member.size
                <= member.end
                <= len(buffer)
            )
            at = member.end
        lib.od_free_tar(tar)


def test_tars_are_checked(tmp_path: Path) -> None:
    for content, why in [
        (b"x" * 600, "no header at byte 0"),
        (header(size=b"00000001000\0"), "in the middle"),
    ]:
        (tmp_path / "tar").write_bytes(content)
        with pytest.raises(LayerInvalid, match=why):
            check_tar(tmp_path / "tar")
    for content in (b"", bytes(512), bytes(100_000), header() + bytes(10)):
        (tmp_path / "tar").write_bytes(content)
        check_tar(tmp_path / "tar")
