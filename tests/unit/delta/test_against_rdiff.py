"""Streams are never larger than those of the block method: every kind of edit, compared with
``rdiff -b 512 -S 32``.

Each release is a seed (``tests/support/layer_edits.py``). `FOUND` are the seeds that failed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from obdelta.delta.build import Effort, LayerBuilder
from obdelta.oci import Form
from tests.support.delta import layer_file, stream_of
from tests.support.delta_reference import decode
from tests.support.layer_edits import Release, rdiff_streams, release

ALLOWED = 300
"""Bytes by which a stream may exceed rdiff's."""
BLOCK = 512

FOUND = [16, 43, 47, 48, 52, 109, 126, 145, 147, 169, 200, 211, 227, 264, 275, 279, 331, 377, 478]
"""Seeds whose streams once were longer than rdiff's, or lost bytes that it copies."""


def _streams(made: Release, targets: list[bytes], effort: Effort) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = [layer_file(content, folder) for content in made.base]
        with LayerBuilder(layers, prices={Form.GZIP: 0}, effort=effort) as builder:
            for target in targets:
                builder.build(layer_file(target, folder), {Form.GZIP: folder / "out"})
                yield stream_of((folder / "out").read_bytes())


def _literals(stream: bytes) -> list[tuple[int, int]]:
    """Yields the ranges of the target's literal bytes, joined."""
    found: list[tuple[int, int]] = []
    at = 0
    for command in decode(stream):
        if command.source is None:
            if found and found[-1][1] == at:
                found[-1] = (found[-1][0], at + command.size)
            else:
                found.append((at, at + command.size))
        at += command.size
    return found


def _longest_lost(ours: bytes, rdiffs: bytes) -> int:
    """Returns the largest number of adjacent literal bytes that the other stream copies."""
    longest = 0
    others = iter([*_literals(rdiffs), (1 << 62, 1 << 62)])
    start, end = next(others)
    for first, last in _literals(ours):
        at = first
        while at < last:
            while end <= at:
                start, end = next(others)
            longest = max(longest, min(start, last) - at)
            at = max(at, min(end, last)) if start < last else last
    return longest


def compare(seed: int, budget: int = 150_000) -> None:
    """Builds a release's layers with every effort and compares the streams with rdiff's."""
    made = release(seed, budget)
    targets = [target for target in made.target if target not in made.base]
    rdiffs = rdiff_streams(made.base, targets)
    for effort in Effort:
        for number, (ours, other) in enumerate(
            zip(_streams(made, targets, effort), rdiffs, strict=True)
        ):
            where = f"seed {seed}, layer {number}, {effort}: {made.edits}"
            assert len(ours) <= len(other) + ALLOWED, where
            assert _longest_lost(ours, other) < BLOCK, where


def test_literals_that_the_other_stream_copies_are_found() -> None:
    literals = b"\x42\x03\xe8" + bytes(1000)
    ours, rdiffs = b"rs\x026" + literals + b"\0", b"rs\x026" + b"\x46\0\x03\xe8" + b"\0"
    assert _longest_lost(ours, rdiffs) == 1000
    assert _longest_lost(rdiffs, ours) == 0
    assert _longest_lost(ours, ours) == 0


@pytest.mark.parametrize("seed", FOUND)
def test_streams_that_were_longer_once(seed: int) -> None:
    compare(seed, 300_000)


@given(st.integers(min_value=0, max_value=2**32))
@example(1)
@settings(max_examples=20, derandomize=True)
def test_streams_of_random_releases_are_not_longer(seed: int) -> None:
    compare(seed)


def test_the_stream_of_a_large_release_is_not_longer() -> None:
    """Thousands of files, and one of some megabytes."""
    for seed in (1, 2, 3):
        compare(10_000 + seed, 3_000_000)
