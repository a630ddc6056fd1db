"""Batches: rsync's bytes, our changes to them, and how rsync reads the result."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.builds.rsync_v2 import UNVERIFIED_TAIL
from obdelta.errors import BatchInvalid
from obdelta.rsync import batch, proof, remote_shell, varint
from obdelta.rsync.batch import EXPECTED, Header, Recording, Tuning
from obdelta.rsync.file_list import FileList
from obdelta.rsync.no_op_padding import MIN_PADDING, Padding
from tests.support import rootfs
from tests.unit.rootfs.test_engine import layers_with_everything


class Raw:
    """The batch that rsync writes for a pair of trees, before any change to it."""

    def __init__(self, directory: Path, tuning: Tuning = batch.DEFAULT_TUNING) -> None:
        layers = layers_with_everything()
        random_file = rootfs.file("random", random.Random(1).randbytes(300_000), mode=0o640)
        self.base = rootfs.tree(
            rootfs.image(layers[:1], directory / "base"), directory / "base-tree"
        )
        self.target = rootfs.tree(
            rootfs.image([*layers, [random_file]], directory / "target"), directory / "target-tree"
        )
        command = batch.record_command(
            directory / "batch",
            self.target,
            (sys.executable, "-I", "-S", remote_shell.__file__),
            tuning,
        )
        subprocess.run(command, env={**os.environ, remote_shell.BASE: f"{self.base}/"}, check=True)
        self.batch = (directory / "batch").read_bytes()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Raw:
    return Raw(tmp_path_factory.mktemp("raw"))


def whole(raw: bytes) -> bytes:
    recording = Recording()
    return recording.feed(raw) + recording.finish()


def apply(stream: bytes, tree: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        batch.apply_command(tree), input=stream, capture_output=True, timeout=30, check=False
    )


def test_old_readers_accept_the_header(raw: Raw) -> None:
    """Protocol 31, with compat_flags in one byte: 3.1 reads one byte in any case."""
    header, length = Header.decode(raw.batch)
    assert header == EXPECTED == Header(0x1FF, 31, 0x0E, 1)
    assert length == 13
    assert raw.batch[8] == 0x0E < 0x80


def test_a_batch_has_the_whole_tree(raw: Raw) -> None:
    recording = Recording()
    stream = recording.feed(raw.batch) + recording.finish()
    paths = list(raw.target.rglob("*"))
    assert recording.entries == len(paths) + 1
    values = [os.getxattr(path, "user.rsync.%stat") for path in paths]
    of_files = [
        stat.S_ISREG(mode) or stat.S_ISLNK(mode)
        for mode in (int(value.split()[0], 8) for value in values)
    ]
    sizes = [path.stat().st_size for path, counts in zip(paths, of_files, strict=True) if counts]
    assert recording.size == sum(sizes)
    assert len(stream) == len(raw.batch) + 2
    assert stream[-7:] == bytes(7)


def test_any_chunking_gives_the_same_batch(raw: Raw) -> None:
    head = raw.batch[:20_000]
    expected = whole(raw.batch)
    for sizes in ([1] * len(head), [2, 3, 5, 7] * 2000, [4096] * 10):
        recording, out, at = Recording(), b"", 0
        for size in sizes:
            out += recording.feed(raw.batch[at : at + size])
            at += size
        out += recording.feed(raw.batch[at:]) + recording.finish()
        assert out == expected


@pytest.mark.parametrize(
    "numbers",
    [
        b"\x00\x1b\x13"
        # 4,891 and 583,810,572: read from one byte later, they are two numbers as well
        + b"\xa2\x0c>\xcc",
        b"\x00,\x01" + b"\xbbQ\xbc?",  # 300 and 994,032,721
        b"\x00V\x03" + b"\x80\x18\x1e\x89",  # 854 and 8,986,136
        b"\x00\x00\x00" + b"\x00\x00\x00",
    ],
)
def test_ambiguous_numbers_at_the_end(raw: Raw, numbers: bytes) -> None:
    """The number of bytes between the two sides differs in each run; of random ones one in
    twenty-five was refused.
    """
    recording = Recording()
    made = recording.feed(raw.batch) + recording.finish()
    begin = (
        len(made) - 2 - (recording.tail - 1)
    )  # one of the numbers in rsync's own batch, which has no lists of names
    first_two = 6 + len(raw.batch) + 2 - len(made)
    assert whole(raw.batch[:begin] + numbers + raw.batch[begin + first_two :]) == made


def test_bytes_are_passed_on_while_more_arrive(raw: Raw) -> None:
    recording = Recording()
    out = recording.feed(raw.batch[:-100])
    assert len(raw.batch) - 100 - len(out) < 100


@pytest.mark.parametrize("extra", [0, 11, 12, 31, 32, 41, 42, 43, 62, 63, 1000, 3_000_000])
def test_rsync_ignores_padding(raw: Raw, tmp_path: Path, extra: int) -> None:
    recording = Recording()
    plain = recording.feed(raw.batch) + recording.finish()
    out = plain[: -recording.tail] + Padding(extra).read(0, extra) + plain[-recording.tail :]
    assert len(out) == len(plain) + extra
    subprocess.run(["cp", "-a", raw.base, tmp_path / "tree"], check=True)
    applied = apply(out, tmp_path / "tree")
    assert (applied.returncode, applied.stderr) == (0, b"")
    assert (tmp_path / "tree/random").read_bytes() == (raw.target / "random").read_bytes()


@given(st.integers(MIN_PADDING, 5000) | st.integers(60_000, 70_000))
def test_padding_of_any_length(length: int) -> None:
    packets = Padding(length).read(0, length + 1)
    assert len(packets) == length
    at = 0
    while at < length:
        assert packets[at : at + 6] == b"\xff\xfe\x80\x03\0\0"
        at += 6
        for _ in range(5):
            value, at = varint.read_varint(packets, at)
            assert value == 0
    assert at == length


@given(st.integers(MIN_PADDING, 500), st.integers(0, 500), st.integers(0, 500))
def test_padding_at_any_offset(length: int, start: int, count: int) -> None:
    padding = Padding(length)
    assert padding.read(start, count) == padding.read(0, length)[start : start + count]


@pytest.mark.parametrize("length", [1, MIN_PADDING - 1, -1])
def test_padding_that_does_not_fit_is_refused(length: int) -> None:
    with pytest.raises(BatchInvalid):
        Padding(length)


def test_the_tail_is_shorter_than_the_unverified_tail(raw: Raw) -> None:
    recording = Recording()
    recording.feed(raw.batch)
    assert len(recording.finish()) >= recording.tail
    assert 3 * 3 + 7 + 1 <= recording.tail <= 3 * 9 + 7 + 1 < UNVERIFIED_TAIL


def broken() -> dict[str, tuple[int, bytes]]:
    """Errors, by the place and by the bytes that are written there."""
    return {
        "protocol": (4, varint.int_bytes(32)),
        "compat flags": (8, b"\x8e"),
        "too long compat flags": (8, b"\xf8"),
        "flags": (0, varint.int_bytes(0x3FF)),
        "seed": (9, varint.int_bytes(2)),
        "names": (13, b"\x04\x04"),
        "unknown flags": (13, b"\x04\x80"),
        "an I/O error": (13, b"\x04\x10\x01"),
    }


@pytest.mark.parametrize(("at", "value"), broken().values(), ids=broken())
def test_forbidden_parts_of_a_batch_are_refused(raw: Raw, at: int, value: bytes) -> None:
    changed = bytearray(raw.batch)
    changed[at : at + len(value)] = value
    with pytest.raises(BatchInvalid):
        whole(bytes(changed))


def test_truncated_batches_are_refused(raw: Raw) -> None:
    for length in (0, 5, 12, 13, 100, 2000, len(raw.batch) - 10_000, len(raw.batch) - 1):
        with pytest.raises(BatchInvalid):
            whole(raw.batch[:length])


@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=5))
def test_mutated_batches_pass_or_are_refused(raw: Raw, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(raw.batch)
    for at, value in changes:
        changed[at] = value
    try:
        stream = whole(bytes(changed))
    except BatchInvalid:
        return
    assert len(stream) == len(changed) + 2


@given(st.binary(max_size=300))
def test_no_bytes_lead_the_file_list_astray(content: bytes) -> None:
    """The reader ends, asks for more or refuses; it never uses more bytes than there are."""
    files = FileList()
    try:
        used, ended = files.feed(content)
    except BatchInvalid:
        return
    assert 0 <= used <= len(content)
    assert ended or used < len(content) or not content[used:]


def test_rsync_reports_the_out_of_sync_answer(raw: Raw, tmp_path: Path) -> None:
    """rsync exits with 23, changes nothing, and waits for no more: standard input stays open."""
    stream = batch.out_of_sync({"Cmd": ["x"]})
    metadata, _, body = stream.partition(b"\0")
    assert json.loads(metadata) == {"version": 2, "dockerConfig": {"Cmd": ["x"]}}
    assert Header.decode(body)[0] == EXPECTED
    (tmp_path / "tree/directory").mkdir(parents=True)
    (tmp_path / "tree/file").write_text("1")
    before = [
        (path, path.stat().st_mtime_ns, path.stat().st_mode) for path in sorted(tmp_path.rglob("*"))
    ]
    for options in ([], ["--fake-super"]):
        command = [
            "rsync",
            "--archive",
            "--delete",
            *options,
            "--read-batch",
            "-",
            f"{tmp_path}/tree/",
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as rsync:
            assert rsync.stdin is not None
            rsync.stdin.write(body)
            rsync.stdin.flush()
            assert rsync.wait(20) == 23
    assert [
        (path, path.stat().st_mtime_ns, path.stat().st_mode) for path in sorted(tmp_path.rglob("*"))
    ] == before


def test_tuning_changes_bytes_only(tmp_path: Path, raw: Raw) -> None:
    other = Raw(tmp_path, Tuning(level=1, block=0))
    assert other.batch != raw.batch
    applied = apply(whole(other.batch), other.base)
    assert applied.returncode == 0, applied.stderr


def test_holes_stay_holes(tmp_path: Path) -> None:
    """Holes stay in the copy for the proof and in its result: a layer of a few bytes must not fill
    the disk.
    """
    size = 30_000_000
    holes = [
        rootfs.sparse(f"hole{number}", size, [(5_000_000, b"x"), (size - 1, b"y")])
        for number in (1, 2)
    ]
    first = [rootfs.sparse("kept", size, []), holes[0]]
    base = rootfs.tree(rootfs.image([first], tmp_path / "1"), tmp_path / "base")
    target = rootfs.tree(rootfs.image([first, [holes[1]]], tmp_path / "2"), tmp_path / "target")
    proof.copy_for_proof(base, target, tmp_path / "device")
    shell = (sys.executable, "-I", "-S", remote_shell.__file__)
    command = batch.record_command(tmp_path / "batch", target, shell)
    subprocess.run(command, env={**os.environ, remote_shell.BASE: f"{base}/"}, check=True)
    applied = apply(whole((tmp_path / "batch").read_bytes()), tmp_path / "device")
    assert applied.returncode == 0, applied.stderr
    proof.check_result(tmp_path / "device", target)
    for place in (base, target, tmp_path / "device"):
        files = [path.stat() for path in place.iterdir()]
        assert {status.st_size for status in files} == {size}
        assert sum(status.st_blocks * 512 for status in files) < 1_000_000


def test_the_remote_side_has_the_old_capabilities() -> None:
    arguments_of_rsync = [
        "host",
        "rsync",
        "--server",
        "-lHogDtprcxze.LsfxCIvu",
        "--delete",
        "--fake-super",
        ".",
        "/",
    ]
    assert remote_shell.arguments(arguments_of_rsync, "/base/") == [
        "rsync",
        "--server",
        "-lHogDtprcxze.Lsf",
        "--delete",
        "--fake-super",
        ".",
        "/base/",
    ]


@pytest.mark.parametrize(
    "arguments_of_rsync",
    [
        ["host", "rsync", "--daemon", "-e.LsfxCIvu", ".", "/"],
        ["host", "rsync", "--server", "-lHogDtprcxz", ".", "/"],
        ["host", "rsync", "--server", "-e.LsfxCIvu", "/", "/"],
        ["host", "rsync", "--server", "-e31.14LsfxCIvu", ".", "/"],
        ["host"],
    ],
)
def test_a_remote_side_with_unknown_arguments(arguments_of_rsync: list[str]) -> None:
    with pytest.raises(ValueError):
        remote_shell.arguments(arguments_of_rsync, "/base/")


def test_quotes_in_the_path_to_the_remote_side() -> None:
    with pytest.raises(ValueError):
        batch.record_command(Path("/batch"), Path("/target"), ("/odd'path/python",))
