"""Files that made a batch large: read from real batches and compared with rsync's own totals; any
bytes are read without harm.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.images import Entry
from obdelta.rsync import batch, remote_shell
from obdelta.rsync.batch import Recording, ReportedFile
from obdelta.rsync.file_costs import TOP, FileCosts
from obdelta.rsync.file_records import Transfers
from tests.support import rootfs

CHANCE = random.Random(8)
OLD, SMALL = CHANCE.randbytes(900_000), CHANCE.randbytes(3000)
NAMES: list[str | bytes] = [
    "with space",
    "trailing ",
    " => arrow",
    "line\nfeed",
    "tab\tand \\#012 and \\",
    "é",
    b"\xff\xfe",
    "abcdef0123456789abcdef0123456789 x",
    "a" * 255,
]


class Case(NamedTuple):
    """Entries of the base, additional ones of the target, and the block size."""

    base: list[Entry]
    target: list[Entry]
    block: int = 512


def shuffled() -> bytes:
    """Returns old contents in many pieces, and some new content."""
    pieces = [OLD[at : at + 5000] for at in range(0, 500_000, 10_000)]
    CHANCE.shuffle(pieces)
    return b"".join(piece + CHANCE.randbytes(300) for piece in pieces)


CASES = {
    "nothing": Case([rootfs.file("a", SMALL)], []),
    "many files": Case(
        [rootfs.file(f"d/{number:04}", b"%d" % number) for number in range(700)],
        # Indexes that take one byte, three bytes, and (never here) five.
        [rootfs.file(f"d/{number:04}", b"%d new" % number) for number in (3, 4, 350, 699)],
    ),
    "names": Case(
        [rootfs.file(name, b"old") for name in NAMES[::2]],
        [rootfs.file(name, b"new " * 10 * number) for number, name in enumerate(NAMES, 1)],
    ),
    "blocks": Case(
        [
            rootfs.file("shuffled", OLD),
            rootfs.file("grown", OLD),
            rootfs.file("cut", OLD),
            rootfs.file("last", OLD[:-300]),
        ],
        [
            rootfs.file("shuffled", shuffled()),
            rootfs.file("grown", OLD + SMALL),
            rootfs.file("cut", OLD[: 512 * 999] + b"!"),
            rootfs.file("last", SMALL + OLD[:-300]),
        ],
    ),
    # More blocks than one run can name, and numbers that do not fit into a flag.
    "long runs": Case(
        [rootfs.file("runs", OLD)],
        [rootfs.file("runs", OLD[700_000:] + OLD[:700_000] + OLD[100_000:])],
        block=10,
    ),
    "what is not sent": Case(
        [
            rootfs.file("mode", SMALL),
            rootfs.file("linked", SMALL),
            rootfs.hardlink("already-linked", "linked"),
            rootfs.file("gone", SMALL),
            rootfs.symlink("link", "old"),
            rootfs.symlink("one-link", "target"),
            rootfs.file("became-link", SMALL),
        ],
        [
            rootfs.file("mode", SMALL, mode=0o600),
            rootfs.file("linked", SMALL, mode=0o640),
            rootfs.hardlink("already-linked", "linked", mode=0o640),
            rootfs.hardlink("new-link", "linked"),
            rootfs.symlink("link", "new"),
            rootfs.symlink("one-link", "target", owner=(5, 5)),
            rootfs.hardlink("second-link", "one-link"),
            rootfs.symlink("became-link", "x"),
            rootfs.device("device", 1, 3),
            rootfs.fifo("fifo"),
            rootfs.directory("directory/below"),
            rootfs.file("directory/below/sent", SMALL),
            rootfs.whiteout("gone"),
        ],
    ),
    "more than are told": Case(
        [], [rootfs.file(f"f{number:02}", SMALL[:number]) for number in range(40)]
    ),
}


class RecordedStream(NamedTuple):
    """The batch and the output of rsync for a case."""

    batch: bytes
    words: list[ReportedFile]
    totals: dict[str, int]
    sizes: dict[bytes, int]


def recorded(case: Case, directory: Path) -> RecordedStream:
    base = rootfs.tree(rootfs.image([case.base], directory / "1"), directory / "base")
    target = rootfs.tree(
        rootfs.image([case.base, case.target], directory / "2"), directory / "target"
    )
    shell = (sys.executable, "-I", "-S", remote_shell.__file__)
    command = batch.record_command(
        directory / "batch", target, shell, batch.Tuning(block=case.block)
    )
    environment = {**os.environ, "LC_ALL": "C", remote_shell.BASE: f"{base}/"}
    output = subprocess.run(
        [*command, "--stats"], env=environment, check=True, capture_output=True
    ).stdout
    totals = {
        name.decode(): int(count.replace(b",", b""))
        for name, count in re.findall(
            rb"^([\w ]+(?:\(reg: )?)[:)]? ?([\d,]+)(?: bytes)?\)?$", output, re.MULTILINE
        )
    }
    words = [
        word
        for line in output.splitlines(keepends=True)
        if (word := batch.parse_sent_file(line)) is not None
    ]
    sizes = {bytes(path.relative_to(target)): path.lstat().st_size for path in target.rglob("*")}
    return RecordedStream((directory / "batch").read_bytes(), words, totals, sizes)


def totals(found: RecordedStream, pieces: int = 1 << 30) -> tuple[dict[str, Any] | None, Recording]:
    recording = Recording()
    shares = FileCosts(recording.transfers)
    words = iter(found.words)
    for at in range(0, len(found.batch), pieces):
        recording.feed(found.batch[at : at + pieces])
        for word in words:
            shares.sent(word)
            break
        shares.join()
    recording.finish()
    for word in words:
        shares.sent(word)
    return shares.totals(), recording


@pytest.mark.parametrize("name", CASES)
def test_costs_add_up_to_the_totals_of_rsync(name: str, tmp_path: Path) -> None:
    found = recorded(CASES[name], tmp_path)
    shares, recording = totals(found)
    assert shares is not None
    top = shares.pop("top")
    assert shares["files"] == found.totals["Number of regular files transferred"]
    assert shares["copied_bytes"] == found.totals["Matched data"]
    assert shares["size"] - shares["copied_bytes"] == found.totals["Literal data"]
    assert shares["size"] == found.totals["Total transferred file size"]
    # The rest is neither lists nor files: records of attributes, of some bytes each, and the end.
    other = len(found.batch) + 2 - recording.head - shares["wire_bytes"]
    assert 3 + 5 * 3 <= other < 1000
    assert len(top) == min(TOP, shares["files"])
    assert [file["wire_bytes"] for file in top] == sorted(
        (file["wire_bytes"] for file in top), reverse=True
    )
    if len(top) < TOP:
        for key in ("size", "wire_bytes", "copied_bytes", "copies"):
            assert sum(file[key] for file in top) == shares[key]
    for word in found.words:
        assert found.sizes[word.name] == word.size
    assert totals(found, 7)[0] == {**shares, "top": top}


def test_the_cost_of_a_file(tmp_path: Path) -> None:
    shares, _ = totals(recorded(CASES["blocks"], tmp_path))
    assert shares is not None
    files = {file["name"]: file for file in shares["top"]}
    assert list(files) == ["shuffled", "grown", "last", "cut"]
    assert files["cut"] | {"wire_bytes": 0} == {
        "name": "cut",
        "size": 512 * 999 + 1,
        "wire_bytes": 0,
        "copied_bytes": 512 * 999,
        "copies": 1,
    }
    assert files["grown"]["copied_bytes"] == len(OLD) // 512 * 512
    assert files["last"]["copied_bytes"] == len(OLD) - 300  # its last block is a short one
    assert 3000 < files["grown"]["wire_bytes"] < 4000
    assert files["shuffled"]["copies"] == 50
    assert 15_000 < files["shuffled"]["wire_bytes"] < 100_000


def test_names_are_text(tmp_path: Path) -> None:
    found = recorded(CASES["names"], tmp_path)
    names = [name.encode() if isinstance(name, str) else name for name in NAMES]
    assert sorted(word.name for word in found.words) == sorted(names)
    shares, _ = totals(found)
    assert shares is not None
    shown = {file["name"] for file in shares["top"]}
    assert {"line\\nfeed", "é", "\\xff\\xfe", "tab\\tand \\\\#012 and \\\\"} < shown


def test_contradictory_costs_are_not_reported(tmp_path: Path) -> None:
    found = recorded(CASES["blocks"], tmp_path)
    assert totals(found._replace(words=found.words[1:]))[0] is None
    assert totals(found._replace(words=[*found.words, ReportedFile(1, b"x")]))[0] is None
    assert totals(found._replace(words=[word._replace(size=0) for word in found.words]))[0] is None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"sent\n",
        b"deleting x\n",
        b"sent 1 => x 0123 y\n",
        b"sent 4096                                  d/\n",
        b"sent x 00 y\n",
        b"sent 1 00 \n",
        b"sent 1 00 unfinished",
    ],
)
def test_other_output_of_rsync_gives_no_costs(line: bytes) -> None:
    assert batch.parse_sent_file(line) is None


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_read_without_harm(content: bytes, pieces: int) -> None:
    transfers = Transfers()
    for at in range(0, len(content), pieces):
        transfers.feed(content[at : at + pieces])
    whole = Transfers()
    whole.feed(content)
    assert (transfers.found, transfers.unreadable) == (whole.found, whole.unreadable)
