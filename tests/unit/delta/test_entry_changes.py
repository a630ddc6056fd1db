"""Causes of an entry's change: verdicts on built layers, and the bytes that advice would save."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from obdelta.delta.reports import entry_changes
from obdelta.delta.reports.entry_changes import shared
from obdelta.delta.reports.image_report import DeltaReport, FilePart, report, verdict
from obdelta.delta.tar_index import Member
from tests.support.delta import File, build, tar_of

RNG = random.Random(5)
WORDS = [RNG.randbytes(4).hex() for _ in range(900)]


def text(lines: int, seed: int) -> bytes:
    rng = random.Random(seed)
    return b"".join(" ".join(rng.choices(WORDS, k=9)).encode() + b"\n" for _ in range(lines))


OLD = text(9_000, 1)
NEW = b"another first line\n" + OLD
PROGRAM = b"\x7fELF" + RNG.randbytes(90_000)


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def reported(base: list[File], target: list[File]) -> DeltaReport:
    """Returns the report of a real layer, as the catalogue keeps it."""
    made = build([tar_of(base)], tar_of(target))
    assert made.layer.explained is not None
    layer = {
        "target": str(made.layer.target),
        "size": made.layer.size,
        "literal_bytes": made.layer.literal_bytes,
        "copied_bytes": made.layer.copied_bytes,
        "explained": asdict(made.layer.explained),
    }
    return report({"layers": [layer]}, 10_000_000, made.layer.size)


def found(base: list[File], target: list[File], name: str) -> FilePart:
    (file,) = [file for file in reported(base, target).files if file.name == name]
    return file


@pytest.mark.parametrize(
    ("name", "pack", "archive"),
    [
        ("a.gz", lambda content: gzip.compress(content, mtime=0), "gzip"),
        ("a.xz", lzma.compress, "xz"),
        ("a.bz2", bz2.compress, "bzip2"),
        ("a.zst", zstandard.compress, "zstd"),
        ("app.jar", lambda content: zipped({"a.txt": content}), "jar"),
        ("x-1.0.whl", lambda content: zipped({"a.txt": content}), "whl"),
        ("plain.zip", lambda content: zipped({"a.txt": content}), "zip"),
    ],
)
def test_an_archive_is_named_and_its_saving_is_estimated(
    name: str, pack: Callable[[bytes], bytes], archive: str
) -> None:
    base, target = [File(name, pack(OLD))], [File(name, pack(NEW))]
    file = found(base, target, name)
    assert (file.change, file.archive, verdict(file)) == ("archive", archive, f"{archive} archive")
    assert 0.5 * file.wire_bytes < file.saved <= file.wire_bytes
    (advice,) = reported(base, target).advice()
    assert advice.text.startswith(f"store {name} uncompressed")
    assert advice.saved == file.saved
    # Following the advice saves as many bytes as it says.
    stored = reported([File("stored", OLD)], [File("stored", NEW)])
    assert stored.delta_bytes < file.wire_bytes - file.saved + 0.2 * file.wire_bytes


def test_an_archive_of_other_content_would_save_little() -> None:
    base = [File("a.gz", gzip.compress(text(9_000, 2), mtime=0))]
    file = found(base, [File("a.gz", gzip.compress(OLD, mtime=0))], "a.gz")
    assert file.change == "archive"
    assert file.saved < 0.1 * file.wire_bytes


def test_unchanged_members_of_a_zip_count_by_their_checksums() -> None:
    noise = {f"{number}.class": RNG.randbytes(20_000) for number in range(20)}
    old = zipped(noise | {"0.txt": text(90, 3)}, zipfile.ZIP_STORED)
    new = zipped({"0.txt": text(90, 4)} | noise)
    file = found([File("a.jar", old)], [File("a.jar", new)], "a.jar")
    assert file.change == "archive"


def test_squashfs_is_named_with_advice_of_its_own() -> None:
    image = b"hsqs" + RNG.randbytes(80_000)
    base = [File("root.squashfs", b"hsqs" + RNG.randbytes(80_000))]
    found_ = reported(base, [File("root.squashfs", image)])
    assert found_.files[0].archive == "squashfs"
    assert "without compression" in found_.advice()[0].text


def test_random_bytes_new_and_edited_files_are_distinguished() -> None:
    base = [File("etc/notes", OLD)]
    target = [
        File("etc/notes", OLD[: len(OLD) // 2] + text(300, 8) + OLD[len(OLD) // 2 :]),
        File("etc/new", text(400, 9)),
        File("key.bin", RNG.randbytes(50_000)),
    ]
    verdicts = {file.name: file.change for file in reported(base, target).files}
    assert verdicts == {"etc/notes": "edited", "etc/new": "new", "key.bin": "random"}


def test_a_recompiled_program_is_named() -> None:
    new = bytearray(PROGRAM)
    for at in range(2_000, len(new), 900):
        new[at : at + 40] = RNG.randbytes(40)
    file = found([File("usr/bin/app", PROGRAM)], [File("usr/bin/app", bytes(new))], "usr/bin/app")
    assert file.change == "recompiled"


def test_files_with_other_times_moved_files_and_others_are_distinguished() -> None:
    rng = random.Random(3)
    files = [File(f"lib/{number:03}", rng.randbytes(2_000), 1) for number in range(60)]
    later = [file._replace(mtime=2) for file in files]
    whole = reported(files, later)
    assert {file.change for file in whole.files} == {"timestamps"}
    (layer,) = whole.layers
    assert layer.retimed == 60
    (advice,) = whole.advice()
    assert advice.text.startswith("set SOURCE_DATE_EPOCH: only the times of 60 entries of layer 1")
    assert 0 < advice.saved <= whole.delta_bytes
    moved = reported(files, [file._replace(name=f"opt/{file.name}") for file in files])
    assert {file.change for file in moved.files} == {"moved"}
    assert moved.layers[0].retimed == 0


def test_an_unchanged_layer_above_a_change_has_advice() -> None:
    layers: list[dict[str, Any]] = [
        {"target": "sha256:" + "0" * 64, "size": 900, "literal_bytes": 800, "copied_bytes": 200},
        {"target": "sha256:" + "1" * 64, "size": 90, "literal_bytes": 0, "copied_bytes": 50_000},
    ]
    advice = report({"common": 1, "layers": layers}, 10_000, 990).advice()
    assert [(one.layer, one.saved) for one in advice] == [(3, 90)]
    assert advice[0].text == (
        "layer 3 is sent again because layer 2 below it changed: put it lower (50,000 bytes of a"
        " device's disk)"
    )


# -- hostile archives ------------------------------------------------------------------------


def looked_into(old: bytes, new: bytes, name: bytes = b"a.zip") -> entry_changes.Change:
    member = Member(0, 512, len(new), len(new) + 512, name, "0")
    return entry_changes.changed_entry(
        member, memoryview(new), member, memoryview(old), lambda: 1.0, look_inside=True
    )


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes_after_a_magic_number_are_accepted(old: bytes, new: bytes) -> None:
    for magic, format_ in entry_changes._MAGIC:
        change = looked_into(magic + old, magic + new)
        assert change.kind == "archive"
        assert change.archive == format_
        assert 0.0 <= change.saved <= 1.0


def test_a_zip_with_a_huge_directory_is_not_read() -> None:
    content = zipped({"a": b"x" * 100})
    directory = bytearray(content)
    at = content.rfind(b"PK\x05\x06")
    struct.pack_into("<L", directory, at + 12, 2 << 20)
    assert looked_into(bytes(directory), content).saved == 0.0


def test_a_bomb_is_unpacked_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(old: bytes, new: bytes) -> float:
        sizes.append(len(old) + len(new))
        return 0.0

    monkeypatch.setattr(entry_changes, "shared", counted)
    zeros = bytes(64 << 20)
    for pack in (gzip.compress, lzma.compress, zstandard.compress, bz2.compress):
        looked_into(pack(zeros), pack(zeros))
    looked_into(zipped({"a": zeros}), zipped({"a": zeros + b"1"}))
    assert len(sizes) == 5
    assert max(sizes) <= 2 * entry_changes._MAX_INNER


def test_bombs_in_a_zip_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(old: bytes, new: bytes) -> float:
        sizes.append(len(old) + len(new))
        return 0.0

    monkeypatch.setattr(entry_changes, "shared", counted)
    names = [f"{number}" for number in range(20)]
    bombs, small = dict.fromkeys(names, bytes(1 << 20)), dict.fromkeys(names, b"x")
    for old, new in ((bombs, small), (small, bombs)):
        sizes.clear()
        looked_into(zipped(old), zipped(new))
        assert 1 << 20 <= sum(sizes) <= 2 * entry_changes._MAX_INNER
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        sizes.clear()
        looked_into(zipped(bombs, method), zipped(small, method))
        assert not sum(sizes)


@given(st.binary(max_size=200))
@example(b"\0\0")
def test_repeated_content_is_counted_once(content: bytes) -> None:
    assert shared(content, content) == (1.0 if content else 0.0)
    assert 0.0 <= shared(content, content + b"\nmore") < 1.0
