"""Records that keep rsync busy: every rsync here skips them slowly, and ends as without them."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from obdelta.rootfs.delay import TOKENS, delay_record
from obdelta.rsync import batch, remote_shell
from obdelta.rsync.file_records import Transfers
from tests.support.unprivileged import nobodys_python
from tests.unit.rsync.test_device import rsyncs, version

FEW = 300
"""Tokens that take a fraction of a second."""


def make_batch(
    directory: Path, base: dict[str, bytes], target: dict[str, bytes]
) -> tuple[bytes, batch.Recording]:
    """Returns the recorder's stream for two directories."""
    for name, files in (("base", base), ("target", target)):
        (directory / name).mkdir()
        for file, content in files.items():
            (directory / name / file).write_bytes(content)
            os.utime(directory / name / file, (1, 1))
    shell = (nobodys_python(), "-I", "-S", remote_shell.__file__)
    command = batch.record_command(directory / "batch", directory / "target", shell)
    command = [one for one in command if "fake-super" not in one]
    environment = {**os.environ, remote_shell.BASE: f"{directory / 'base'}/"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    recording = batch.Recording()
    return recording.feed((directory / "batch").read_bytes()) + recording.finish(), recording


@pytest.mark.parametrize("rsync", rsyncs(), ids=lambda path: ".".join(map(str, version(path))))
@pytest.mark.parametrize("files", [1, 3, 600])
def test_a_batch_with_a_delay_makes_the_same_tree(rsync: Path, files: int, tmp_path: Path) -> None:
    """The last sent file is found, whether its number takes one byte or three."""
    names = [f"{number:05}" for number in range(files)]
    base = dict.fromkeys(names, b"old")
    target = {**base, names[0]: b"first", names[-1]: b"last"}
    stream, recording = make_batch(tmp_path, base, target)
    assert recording.transfers.sent_index == files  # number 0 is the directory
    at = len(stream) - recording.tail - batch.BEFORE_DONES
    delayed = stream[:at] + delay_record(files, FEW) + stream[at:]
    command = [
        str(rsync),
        "--archive",
        "--delete",
        "--verbose",
        "--read-batch",
        "-",
        f"{tmp_path / 'base'}/",
    ]
    ran = subprocess.run(command, input=delayed, check=True, capture_output=True)
    assert f'Skipping batched update for resend of "{names[-1]}"' in ran.stdout.decode()
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == target


def test_large_numbers_of_a_delayed_batch_are_read() -> None:
    """Numbers above 32,767 are written in four bytes; the next ones are relative to them."""
    end = bytes(4) + struct.pack("<3i", 0, 0, 0) + b"\0" + bytes(16)
    transfers = Transfers()
    transfers.feed(b"\xfe\x80\x70\x11\x01" + b"\x00\x80" + end + b"\x02\x00\x80" + end)
    assert (transfers.sent_index, len(transfers.found), transfers.unreadable) == (
        0x11170 + 2,
        2,
        False,
    )


@pytest.mark.parametrize("rsync", rsyncs(), ids=lambda path: ".".join(map(str, version(path))))
def test_the_answer_without_a_delta_deletes_nothing(rsync: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"x")
    stream = batch.delayed_out_of_sync(FEW).partition(b"\0")[2]
    command = [
        str(rsync),
        "--archive",
        "--delete",
        "--verbose",
        "--read-batch",
        "-",
        f"{tmp_path}/",
    ]
    ran = subprocess.run(command, input=stream, check=False, capture_output=True)
    assert (ran.returncode, b"Skipping batched update" in ran.stdout) == (23, True)
    assert (tmp_path / "kept").read_bytes() == b"x"


def test_a_delay_fits_into_the_buffers_before_rsync() -> None:
    """A pipe holds 64 KiB, rsync's input 32 KiB, three streams of Node 16 KiB each: more bytes
    would delay the closing.
    """
    assert len(delay_record(0)) == 3 * TOKENS + 4 * -(-TOKENS // 30_000) + 7 + 16 + 17 <= 144 << 10
