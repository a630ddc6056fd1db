"""Building delta layers: any base and target, every effort; proven by the builder and by the
reference.
"""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdelta.delta.build import Effort, LayerBuilder, Progress, build_layer
from obdelta.delta.kernel.binding import lib
from obdelta.oci import DiffID, Digest, Form
from tests.support import delta_reference as reference
from tests.support.delta import File, Made, build, by_rdiff, layer_file, stream_of, tar_in, tar_of
from tests.support.releases import releases


def check(base: list[bytes], target: bytes, made: Made) -> None:
    """Asserts that the stream makes the target, and that the layer's report is true."""
    assert reference.apply(b"".join(base), made.stream) == target
    commands = list(reference.decode(made.stream))
    copies = [c for c in commands if c.source is not None]
    layer = made.layer
    tar = tar_in(made.blob)
    assert (layer.digest, layer.size) == (Digest.of(made.blob), len(made.blob))
    assert (layer.diff_id, layer.tar_size, layer.target) == (
        DiffID.of(tar),
        len(tar),
        DiffID.of(target),
    )
    assert (layer.copies, layer.small_copies) == (len(copies), sum(c.size < 64 for c in copies))
    assert layer.copies + layer.literals == len(commands)
    assert layer.copied_bytes == sum(c.size for c in copies)
    assert layer.literal_bytes == sum(c.size for c in commands if c.source is None)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("effort", Effort)
def test_deltas_of_releases_give_their_targets(effort: Effort, form: Form, tmp_path: Path) -> None:
    base, target = releases()
    made = build(base, target, form=form, effort=effort, threads=2)
    check(base, target, made)
    assert by_rdiff(base, made.stream, tmp_path) == target
    assert made.layer.literal_bytes < len(target) // 5
    assert set(made.layer.seconds) == {"index", "match", "deflate", "prove"}


PIECES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(st.binary(min_size=1, max_size=9), st.integers(1, 200)).map(
            lambda p: p[0] * p[1]
        ),
        st.integers(0, 2**32).map(lambda seed: random.Random(seed).randbytes(200)),
        st.integers(0, 2**32).map(
            lambda seed: tar_of([File(f"n{seed % 5}", random.Random(seed).randbytes(seed % 900))])
        ),
    ),
    max_size=8,
)


PRICES = st.one_of(st.sampled_from([0, 10, 25]), st.floats(0, 40), st.floats(0, 20_000))
"""Bytes that a command may cost."""


@settings(max_examples=150)
@given(PIECES, PIECES, st.data())
def test_deltas_of_any_bytes_give_their_targets(
    tmp_path_factory: pytest.TempPathFactory,
    old: list[bytes],
    new: list[bytes],
    data: st.DataObject,
) -> None:
    """Bytes that are no tar are planned too, and common bytes may be anywhere."""
    shared = data.draw(st.lists(st.sampled_from(old), max_size=6)) if old else []
    target = b"".join(data.draw(st.permutations(new + shared)))
    cut = data.draw(st.integers(0, len(old)))
    base = [b"".join(old[:cut]), b"", b"".join(old[cut:])]
    effort, form = data.draw(st.sampled_from(Effort)), data.draw(st.sampled_from(Form))
    made = build(base, target, form=form, price=data.draw(PRICES), effort=effort)
    check(base, target, made)
    if data.draw(st.integers(0, 9)) == 0:
        assert by_rdiff(base, made.stream, tmp_path_factory.mktemp("rdiff")) == target


@settings(max_examples=60)
@given(st.binary(min_size=20, max_size=300), st.data())
def test_a_delta_is_not_larger_than_with_the_plain_search(base: bytes, data: st.DataObject) -> None:
    """Compared with a greedy search for the longest copies, which knows no prices and reads every
    byte of the base.
    """
    parts = data.draw(
        st.lists(
            st.one_of(st.binary(max_size=20), st.tuples(st.integers(0, 200), st.integers(0, 200))),
            max_size=5,
        )
    )
    target = b"".join(
        part if isinstance(part, bytes) else base[part[0] : part[0] + part[1]] for part in parts
    )
    greedy = reference.encode(reference.match(base, target))
    assert reference.apply(base, greedy) == target
    made = build([base * 3], target, price=0, effort=Effort.SMALL)
    check([base * 3], target, made)
    # Copies that gzip compresses equally well are not made, so compressed sizes are compared. The
    # size after gzip is estimated, and the estimate is poor for so few bytes.
    assert len(gzip.compress(made.stream)) <= len(gzip.compress(greedy)) + 100


@pytest.mark.parametrize("form", Form)
def test_copies_are_bounded(form: Form) -> None:
    """If every few bytes of the target are somewhere in the base, devices need not seek for each
    of them, even if commands cost nothing.
    """
    rng, piece = random.Random(15), 20
    base = rng.randbytes(200_000)
    starts = [rng.randrange(len(base) - piece) for _ in range(300_000 // piece)]
    target = b"".join(base[start : start + piece] + rng.randbytes(1) for start in starts)
    old, new = tar_of([File("file", base)]), tar_of([File("file", target)])
    made = build([old], new, form=form, price=0, effort=Effort.SMALL)
    check([old], new, made)
    most = len(new) / lib.OD_BYTES_PER_COPY + 2
    assert len(starts) > 1.1 * most, "this would not be too many"
    assert 0.8 * most < made.layer.copies <= most


@settings(max_examples=60)
@given(PIECES, st.data())
def test_a_higher_price_never_gives_more_commands(old: list[bytes], data: st.DataObject) -> None:
    base = b"".join(old)
    edits = data.draw(st.lists(st.tuples(st.integers(0, 1000), st.binary(max_size=6)), max_size=30))
    target = bytearray(base * 2)
    for at, content in edits:
        place = at * len(target) // 1001
        target[place : place + len(content)] = content
    effort, form = data.draw(st.sampled_from(Effort)), data.draw(st.sampled_from(Form))
    commands = []
    # The byte before it makes sure that the base has no headers, whose copies count less.
    for price in sorted(data.draw(st.lists(PRICES, min_size=2, max_size=5, unique=True))):
        made = build([b"x" + base], bytes(target), form=form, price=price, effort=effort)
        commands.append(sum(1 for _ in reference.decode(made.stream)))
    assert commands == sorted(commands, reverse=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", Form)
def test_a_dearer_command_trades_commands_for_bytes(form: Form, seed: int) -> None:
    base, target = releases(seed)
    prices = (0, 4, 10, 25, 99)
    made = [build(base, target, form=form, price=price).layer for price in prices]
    copies = [layer.copies for layer in made]
    assert copies == sorted(copies, reverse=True)
    assert copies[-1] < copies[0] / 2
    # At its own price, no plan is much worse than another.
    for price, layer in zip(prices, made, strict=True):
        costs = [other.size + price * 2 * other.copies for other in made]
        assert layer.size + price * 2 * layer.copies <= 1.15 * min(costs)


def test_headers_are_copied_more_readily_than_contents() -> None:
    """No file is opened to copy a header, so such a copy counts less."""
    rng = random.Random(5)
    order = [*range(1, 64, 2), *range(0, 64, 2)]
    blocks = [rng.randbytes(512) for _ in range(64)]
    old, new = (
        tar_of([File("file", b"".join(blocks[n] for n in numbers))])
        for numbers in (range(64), order)
    )
    assert build([old], new, price=150).layer.copies > 32
    assert build([old], new, price=350).layer.copies < 8
    empty = [File(rng.randbytes(40).hex() * 2, b"") for _ in range(64)]
    base, target = tar_of(empty), tar_of([empty[n] for n in order])
    assert build([base], target, price=150).layer.copies > 32
    contents = tar_of([File("file", base)])
    assert build([contents], target, price=150).layer.copies < 8


def test_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    base, target = releases(2, 400)
    made = [build(base, target, threads=threads) for threads in (1, 2, 5)]
    made.append(build(base, target, threads=2, index_dir=tmp_path))
    made.append(build(base, target, threads=2, index_dir=tmp_path))
    assert len({each.blob for each in made}) == 1
    assert len(made[0].layer.seconds) == 4


@pytest.mark.parametrize("shift", [0, 1, 511, 70_001])
def test_a_shifted_copy_is_a_handful_of_commands(shift: int) -> None:
    content = random.Random(3).randbytes(3_000_000)
    made = build([content], b"x" * shift + content)
    assert made.layer.copies <= 2
    assert made.layer.literal_bytes <= shift + 64


@pytest.mark.parametrize("effort", Effort)
def test_a_base_without_a_sample_is_still_searched(effort: Effort) -> None:
    rng = random.Random(12)
    bases = [[rng.randbytes(150)[:size] for size in (40, 0, 150)] for _ in range(20)]
    for base in bases:
        target = rng.randbytes(5000) + base[2][10:140] + rng.randbytes(300)
        made = build(base, target, effort=effort)
        check(base, target, made)
        assert made.layer.copied_bytes >= 120


def test_a_copy_may_begin_one_byte_before_its_own_position() -> None:
    """A copy from one byte to the left: this distance could be mistaken for a marker."""
    content = random.Random(4).randbytes(100_000)
    made = build([content], content[99:])
    check([content], content[99:], made)
    assert made.layer.literal_bytes == 0
    made = build([b"z" + content], content + b"y" * 100)
    assert made.layer.copies == 1


@pytest.mark.parametrize(
    ("base", "target"),
    [
        ([], b""),
        ([], bytes(1024)),
        ([b""], b"abc" * 100),
        ([bytes(1024)], bytes(1024)),
        ([bytes(10240)], b""),
    ],
)
def test_empty_bases_and_targets(base: list[bytes], target: bytes) -> None:
    made = build(base, target)
    check(base, target, made)


def test_repetitive_content_takes_bounded_work() -> None:
    """All windows are alike: the work is still bounded."""
    rng = random.Random(5)
    records = b"".join(
        rng.randrange(1 << 24).to_bytes(8, "little") + b"\x08" + bytes(7) for _ in range(60_000)
    )
    other = b"".join(
        rng.randrange(1 << 24).to_bytes(8, "little") + b"\x08" + bytes(7) for _ in range(60_000)
    )
    for base, target in [
        (records, other),
        (bytes(2_000_000), bytes(1_999_999) + b"x"),
        (b"ab" * 500_000, b"ba" * 499_999),
    ]:
        check([base], target, build([base], target, threads=2))


def test_a_layer_of_the_base_is_one_copy(tmp_path: Path) -> None:
    base, _ = releases(6, 20)
    layers = [layer_file(content, tmp_path) for content in base]
    seen: list[Progress] = []
    layer = build_layer(layers, layers[1].diff_id, tmp_path / "out", progress=seen.append)
    stream = stream_of((tmp_path / "out").read_bytes())
    assert list(reference.decode(stream)) == [reference.Command(len(base[1]), len(base[0]))]
    assert (layer.copies, layer.literal_bytes, layer.target) == (1, 0, layers[1].diff_id)
    with pytest.raises(ValueError, match="not a layer of the base"):
        build_layer(layers, DiffID.of(b"another"), tmp_path / "out")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    base, target = releases(7, 20)
    seen: list[Progress] = []
    layers = [layer_file(content, tmp_path) for content in base]
    build_layer(
        layers, layer_file(target, tmp_path), tmp_path / "out", threads=2, progress=seen.append
    )
    for stage in ("match", "deflate"):
        done = [step.done for step in seen if step.stage == stage]
        assert done == sorted(done)
        assert done[-1] == len(target) == seen[-1].of


def test_an_error_waits_for_readers_of_the_target(tmp_path: Path) -> None:
    """Threads are working when the build fails: nothing is unmapped while they read it (once, that
    was a crash).
    """
    base, target = releases(2, 400)
    layers = [layer_file(content, tmp_path) for content in base]
    for stage in ("match", "deflate") * 3:

        def failing(step: Progress, at: str = stage) -> None:
            if step.stage == at:
                raise MemoryError

        with pytest.raises(MemoryError):
            build_layer(
                layers, layer_file(target, tmp_path), tmp_path / "out", threads=3, progress=failing
            )
        assert not (tmp_path / "out").exists()


def test_one_base_for_several_layers(tmp_path: Path) -> None:
    base, target = releases(8, 20)
    layers = [layer_file(content, tmp_path) for content in base]
    with LayerBuilder(layers, threads=2) as builder:
        first, second, third = (
            builder.build(wanted, {Form.GZIP: tmp_path / "out"})[Form.GZIP]
            for wanted in (
                layer_file(target, tmp_path),
                layers[0].diff_id,
                layer_file(target[:-512], tmp_path),
            )
        )
    assert first.digest == build(base, target).layer.digest
    assert second.target == layers[0].diff_id
    assert third.digest == build(base, target[:-512]).layer.digest
