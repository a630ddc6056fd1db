"""Crafted layers take no more work than others: the work is counted, and grows with the input."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.hostile_contents import (
    a_byte_in_each_line,
    equal_weak_checksums,
    shuffled_pieces,
)
from bench.hostile_images import Pattern
from bench.hostile_layers import PATTERNS, Pair
from obdelta.delta import engine_compat, planner
from obdelta.delta.build import Effort, LayerBuilder, LayerFile
from obdelta.delta.effort import TUNINGS
from obdelta.delta.kernel.binding import Base, MappedFile, lib, owned
from obdelta.delta.layer_index import layer_indexes, target_index
from obdelta.delta.planner import BaseIndex, LayerPlanner, Task
from obdelta.delta.tar_index import Member
from obdelta.oci import Form
from tests.support.counting import calls
from tests.support.delta import File, build, layer_file, tar_of

K0, K1 = 0xA0761D6478BD642F, 0xE7037ED1A0B428DB
"""Words of the kernel's hash of contents that cancel the words before them."""


@contextmanager
def planned(
    base: bytes, target: bytes, folder: Path, effort: Effort = Effort.BALANCED
) -> Iterator[LayerPlanner]:
    """Yields the planner of a layer."""
    layer = layer_file(base, folder)
    with Base([layer.path]) as mapped, ThreadPoolExecutor(1) as pool:
        index = BaseIndex(mapped, layer_indexes([layer], mapped.files, None, pool))
        file = MappedFile(layer_file(target, folder).path)
        yield LayerPlanner(index, file, target_index(file, pool), TUNINGS[effort], pool)
        file.close()


def same_hash(blocks: int, number: int) -> bytes:
    """Returns content with the same hash for any number of blocks and any number."""
    word = struct.Struct("<8Q").pack(number, K0, number, K0, 0, K0, number, K0)
    return word * blocks + struct.pack("<7Q", 0, K0, 0, K0, 0, K0 ^ 1, 0)


@pytest.mark.parametrize("kind", ["other sizes", "one size", "one size, long beginnings"])
def test_crafted_hashes_make_no_long_chains(kind: str, tmp_path: Path) -> None:
    def files(first: int, count: int) -> list[File]:
        if kind == "other sizes":
            # Sizes that the other side does not have: each look-up would be in vain.
            return [File(f"{first + n}", same_hash(2 * n + 2 + first % 2, 1)) for n in range(count)]
        if kind == "one size":
            return [File(f"{first + n}", same_hash(2, first + n)) for n in range(count)]
        return [
            File(f"{first + n}", same_hash(100, 7) + same_hash(1, first + n)) for n in range(count)
        ]

    work = []
    for count in (100, 400):
        base, target = tar_of(files(0, count)), tar_of(files(10_001, count))
        with planned(base, target, tmp_path) as planner:
            hashes = {entry[4] for entry in planner._index.layers[0].fields}
            assert len(hashes) == 1 or kind == "one size, long beginnings"
            work.append(lib.od_exact_steps(planner._exact) / len(target))
    # Steps for each byte: no more if there are four times as many entries.
    assert work[1] <= 1.5 * work[0] + 0.01
    assert work[1] < 0.1


def test_names_that_differ_in_digits_are_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0
    member = BaseIndex._member

    def counted(index: BaseIndex, number: int) -> Member:
        nonlocal looked_at
        looked_at += 1
        return member(index, number)

    monkeypatch.setattr(BaseIndex, "_member", counted)
    base = tar_of([File(f"frames/{number:06}.png", b"%d" % number) for number in range(2000)])
    target = tar_of(
        [File(f"frames/{number:06}.png", b"n%d" % number) for number in range(2000, 4000)]
    )
    with planned(base, target, tmp_path):
        assert looked_at == 2000
    made = build([base], target)
    assert made.layer.copied_bytes > len(target) // 2


def test_the_stems_of_moved_files_are_not_looked_up(tmp_path: Path) -> None:
    names = [chr(97 + number) * 3 for number in range(20)]
    base = tar_of([File(f"old/{name}", name.encode() * 50) for name in names])
    target = tar_of([File(f"new/{name}", name.encode() * 50) for name in names])
    with planned(base, target, tmp_path) as found:
        assert len(found.entries) == 20
        assert all(found.old_version(number) is None for number in range(20))
        # Each new stem would be compared with all entries of the base.
        assert not found._index._by_stem


def test_the_nearest_size_is_taken(tmp_path: Path) -> None:
    base = tar_of(
        [
            File(f"v{number}", bytes([65 + number]) * size)
            for number, size in enumerate([10, 40, 40, 90])
        ]
    )
    sizes = [5, 10, 24, 25, 26, 40, 64, 65, 66, 90, 1000]
    target = tar_of([File(f"v{number + 10}", b"x" * size) for number, size in enumerate(sizes)])
    with planned(base, target, tmp_path) as planner:
        found = [old.name for _, old in planner._changed if old is not None]
    # Takes the smaller of two sizes that are equally near, and the first of equal ones.
    assert found == [b"v0", b"v0", b"v0", b"v0", b"v1", b"v1", b"v1", b"v1", b"v3", b"v3", b"v3"]


def test_deep_paths_are_compared_once() -> None:
    deep = b"/".join([b"a"] * 200_000)
    assert not engine_compat._any_below({deep, b"b/c"}, {deep + b"/x", b"b/c/d", b"c"})
    assert engine_compat._any_below({deep}, {b"a/a/a", b"a/a/a/a/b"})
    assert engine_compat._any_below({b"./x//y"}, {b"x/y"})
    assert not engine_compat._any_below({b"x/yy", b"x"}, {b"x/y"})
    assert not engine_compat._any_below({b"x"}, set())
    assert planner.stem(b"v1.2/a10") == b"v/a"


def _work(planner: LayerPlanner, task: Task) -> int:
    job, _kept = planner._job(task)
    matches = owned(lib.od_find_matches(job), lib.od_free_matches)
    return int(matches.work)


def _pair_of(pattern: Pattern) -> Callable[[int], Pair]:
    """Returns the one layer of each image of a pattern."""

    def made(size: int) -> Pair:
        (base,), (target,) = pattern(size)
        return base, target

    return made


SEARCHED = PATTERNS | {
    pattern.__name__: _pair_of(pattern)
    for pattern in (equal_weak_checksums, shuffled_pieces, a_byte_in_each_line)
}


@pytest.mark.parametrize("name", SEARCHED)
def test_compared_bytes_grow_linearly_with_the_size(name: str, tmp_path: Path) -> None:
    """The compared bytes for each target byte are bounded, and no more in a layer of four times
    the size.
    """
    for effort in Effort:
        work = []
        for size in (100_000, 400_000):
            base, target = SEARCHED[name](size)
            with planned(base, target, tmp_path, effort) as planner:
                work.append(sum(_work(planner, task) for task in planner.tasks()) / len(target))
        assert work[1] <= 2 * work[0] + 1, effort
        assert work[1] <= 40, effort


def test_each_of_many_layers_costs_the_same(tmp_path: Path) -> None:
    """An image may share 120 layers with its base: no layer reads the others, and none starts
    threads.
    """
    threads, begun = set[int | None](), threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        begun(thread)
        threads.add(thread.ident)

    work = []
    for count in (30, 120):
        layers = [
            layer_file(tar_of([File(f"f{n}", b"%d" % n * 500)]), tmp_path) for n in range(count)
        ]
        with LayerBuilder(layers) as builder, pytest.MonkeyPatch.context() as patched:
            patched.setattr(threading.Thread, "start", counted)

            def build_all(
                builder: LayerBuilder = builder, layers: list[LayerFile] = layers
            ) -> None:
                for layer in reversed(layers):
                    builder.build(layer.diff_id, {Form.GZIP: tmp_path / "delta"})

            work.append(calls(build_all) / count)
    assert work[1] <= 1.02 * work[0]
    assert not threads
