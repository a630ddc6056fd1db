"""Reading tars: those of other programs, and malformed ones."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.errors import LayerInvalid
from obdelta.rootfs import tar
from obdelta.rootfs.tar import Member


def read(path: Path) -> list[Member]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(tar.members(descriptor, "the test's"))
    finally:
        os.close(descriptor)


def content(path: Path, member: Member) -> bytes:
    """Returns a file's content with its holes."""
    whole, archive = bytearray(member.size), path.read_bytes()
    for position, source, length in member.extents:
        whole[position : position + length] = archive[source : source + length]
    return bytes(whole)


def header(name: bytes = b"x", kind: bytes = b"0", **fields: bytes) -> bytes:
    """Returns a ustar header; fields by offset are written unchanged, and the checksum is
    corrected.
    """
    places = {
        "size": (124, 12),
        "mode": (100, 8),
        "uid": (108, 8),
        "mtime": (136, 12),
        "major": (329, 8),
    }
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = block[108:116] = block[116:124] = b"0000644\0"
    block[124:136] = block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for field, value in fields.items():
        at, length = places[field]
        block[at : at + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    text = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length += 1
        text += b"%d" % length + rest
    return header(kind=kind, size=b"%011o" % len(text)) + text + bytes(-len(text) % 512)


END = bytes(1024)


def test_all_tar_formats_give_the_same_entries(tmp_path: Path) -> None:
    """Tars that Python writes in three formats are read the same, and as Python reads them."""
    names = ["short", "d" * 90 + "/" + "n" * 90, "é/ü", "\udcff\udcfe"]
    found = {}
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        path = tmp_path / name
        with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
            for number, long in enumerate([*names, "l" * 300, "p/" * 200 + "q"]):
                info = tarfile.TarInfo(long)
                info.size, info.mtime, info.uid, info.mode = (
                    number * 700,
                    number,
                    5_000_000_000 if number else 7,
                    0o4711,
                )
                archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
                link = tarfile.TarInfo(f"link-{number}")
                link.type, link.linkname = tarfile.SYMTYPE, long
                archive.addfile(link)
        found[name] = [member._replace(extents=()) for member in read(path)]
        with tarfile.open(path, errors="surrogateescape") as archive:
            infos = archive.getmembers()
        for member, info in zip(read(path), infos, strict=True):
            assert member.name == os.fsencode(info.name)
            assert (member.size, member.mode, member.uid, member.linkname) == (
                info.size,
                info.mode,
                info.uid,
                os.fsencode(info.linkname),
            )
            if member.type == tar.REGULAR:
                assert content(path, member) == bytes([member.size // 700]) * member.size
    assert found["gnu"] == found["pax"]


@pytest.mark.parametrize("form", ["0.0", "0.1", "1.0"])
def test_sparse_files_of_gnu_tar_are_read(tmp_path: Path, form: str) -> None:
    expected = {}
    with (tmp_path / "holes").open("wb") as file:
        for number in range(200):
            file.seek(number * 40_000)
            file.write(b"%d" % number * 50)
        file.truncate(9_000_000)
    (tmp_path / "all-hole").write_bytes(b"")
    os.truncate(tmp_path / "all-hole", 1_000_000)
    (tmp_path / "plain").write_bytes(b"no hole")
    for name in ("holes", "all-hole", "plain"):
        expected[name.encode()] = (tmp_path / name).read_bytes()
    options = ["--format=pax", "--sparse", f"--sparse-version={form}", "--hole-detection=raw"]
    subprocess.run(
        ["tar", "-cf", "archive", *options, "holes", "all-hole", "plain"], cwd=tmp_path, check=True
    )
    archive = tmp_path / "archive"
    assert archive.stat().st_size < 1_500_000
    assert {member.name: content(archive, member) for member in read(archive)} == expected


def test_times_are_read(tmp_path: Path) -> None:
    times = [b"1.5", b"-1.5", b"1700000000.123456789999", b"0", b"-0.000000001", b"12."]
    path = tmp_path / "archive"
    path.write_bytes(b"".join(pax((b"mtime", one)) + header() for one in times) + END)
    assert [member.mtime for member in read(path)] == [
        1_500_000_000,
        -1_500_000_000,
        1_700_000_000_123_456_789,
        0,
        -1,
        12_000_000_000,
    ]


def test_odd_valid_tars_are_read(tmp_path: Path) -> None:
    """Directories by a slash, sizes without content, global headers, no end, empty records."""
    path = tmp_path / "archive"
    path.write_bytes(
        pax((b"comment", b"from git"), (b"path", b"ignored"), kind=b"g")
        + header(b"old/", b"\0")
        + header(b"old", b"\0")
        + header(b"link", b"2", size=b"00000000777")
        + pax((b"path", b""), (b"uid", b"70000"))
        + header(b"kept")
        + header(b"negative", mtime=b"\xff" * 12)
        + header(b"spaces", mode=b"  644 \0", uid=b"")
    )
    members = read(path)
    assert [(one.name, one.type) for one in members] == [
        (b"old/", tar.DIRECTORY),
        (b"old", tar.REGULAR),
        (b"link", tar.SYMLINK),
        (b"kept", tar.REGULAR),
        (b"negative", tar.REGULAR),
        (b"spaces", tar.REGULAR),
    ]
    assert members[3].uid == 70000
    assert members[4].mtime == -(10**9)
    assert (members[5].mode, members[5].uid) == (0o644, 0)


BAD: dict[str, bytes] = {
    "checksum": b"y" + header()[1:] + END,
    "no header": b"\1" * 512,
    "half a block": header() + bytes(100),
    "content beyond the end": header(size=b"00000001000") + bytes(100),
    "negative size": header(size=b"\xff" * 12) + END,
    "enormous size": header(size=b"\x80" + b"\xff" * 11) + END,
    "letters for a size": header(size=b"12x") + END,
    "underscores": header(size=b"1_0") + END,
    "eight": header(size=b"8") + END,
    "unknown type": header(kind=b"Z") + END,
    "old sparse type": header(kind=b"S") + END,
    "contiguous": header(kind=b"7") + END,
    "one zero block and more": header() + bytes(512) + header() + END,
    "ends after pax": pax((b"path", b"x")),
    "huge pax header": header(kind=b"x", size=b"00100000000") + bytes(1 << 20) + END,
    "pax without length": (
        header(kind=b"x", size=b"00000000005") + b"a b=c".ljust(512, b"\0") + header() + END
    ),
    "pax length too large": (
        header(kind=b"x", size=b"00000000010") + b"99 a=b\n\n".ljust(512, b"\0") + header() + END
    ),
    "pax length zero": (
        header(kind=b"x", size=b"00000000010") + b"0 a=b\n\n\n".ljust(512, b"\0") + header() + END
    ),
    "pax without equals": (
        header(kind=b"x", size=b"00000000006") + b"6 abc\n".ljust(512, b"\0") + header() + END
    ),
    "NUL in a path": pax((b"path", b"a\0b")) + header() + END,
    "pax size not a number": pax((b"size", b"x")) + header() + END,
    "mtime not a number": pax((b"mtime", b"1e5")) + header() + END,
    "sparse map of one number": pax((b"GNU.sparse.map", b"1")) + header() + END,
    "sparse map backwards": (
        pax((b"GNU.sparse.map", b"5,1,0,1"), (b"GNU.sparse.size", b"9"))
        + header(size=b"2")
        + bytes(512)
        + END
    ),
    "sparse map beyond the file": (
        pax((b"GNU.sparse.map", b"5,2"), (b"GNU.sparse.size", b"6"))
        + header(size=b"2")
        + bytes(512)
        + END
    ),
    "sparse map and more content": (
        pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"6"))
        + header(size=b"2")
        + bytes(512)
        + END
    ),
    "sparse map that never ends": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
        + header(size=b"2000")
        + b"1" * 1024
        + END
    ),
    "sparse map of a million": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
        + header(size=b"1000")
        + b"1000000\n".ljust(512, b"0")
        + END
    ),
}


@pytest.mark.parametrize("archive", BAD.values(), ids=BAD)
def test_broken_tars_are_refused(tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "archive"
    path.write_bytes(archive)
    with pytest.raises(LayerInvalid, match="the test's"):
        read(path)


def sample() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, size in (("a", 0), ("b" * 200, 700), ("ü", 512)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5
            archive.addfile(info, io.BytesIO(bytes(size)))
    return out.getvalue()


def test_truncated_tars_give_no_partial_member(tmp_path: Path) -> None:
    """A truncated tar is refused, or cut between two members (Go takes that for the end, too): no
    member is ever incomplete.
    """
    path = tmp_path / "archive"
    path.write_bytes(sample())
    whole, refused = read(path), 0
    for length in range(0, len(sample()) - 1024, 61):
        path.write_bytes(sample()[:length])
        found = read_or_none(path, read)
        refused += found is None
        if found is not None:
            assert found == whole[: len(found)]
            assert all(
                one.source + one.length <= length for member in found for one in member.extents
            )
    assert refused > 20


@given(st.integers(0, 2**32))
def test_mutations_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    archive = bytearray(sample())
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(archive))
        archive[at] = chance.choice([0, 32, 48, 55, 128, 255, chance.randrange(256)])
    for at in range(
        0, len(archive), 512
    ):  # most headers have a right checksum, so that later checks are reached
        block = archive[at : at + 512]
        if block[257:262] == b"ustar" and chance.random() < 0.9:
            block[148:156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(archive)
    for member in read_or_none(path, read) or []:
        assert sum(one.length for one in member.extents) <= len(archive)
        assert all(one.source + one.length <= len(archive) for one in member.extents)


def read_or_none(path: Path, reader: Callable[[Path], list[Member]]) -> list[Member] | None:
    try:
        return reader(path)
    except LayerInvalid:
        return None
