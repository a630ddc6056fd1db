"""Explanations of a delta's size: the kernel's shares against a plain count, names, estimates, and
the report of a real build.
"""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import asdict
from io import BytesIO
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdelta.delta.kernel.binding import ffi, lib
from obdelta.delta.reports.image_report import report, report_from_json
from obdelta.delta.reports.layer_report import TOP, ExplainedLayer
from obdelta.oci import printable_name
from obdelta.oci.filenames import MAX_PRINTED_NAME
from tests.support import delta_reference as reference
from tests.support.delta import File, Made, build, tar_of

Counts = tuple[int, int, int, int]


def counted(commands: list[tuple[int, bool]], ranges: list[tuple[int, int]]) -> list[Counts]:
    """Counts literal bytes, copied bytes, copies and small copies of each range, and of the rest,
    byte by byte.
    """
    sums = [[0, 0, 0, 0] for _ in range(len(ranges) + 1)]
    at = 0

    def place(position: int) -> list[int]:
        return next(
            (sums[i] for i, (start, end) in enumerate(ranges) if start <= position < end), sums[-1]
        )

    for size, is_copy in commands:
        for position in range(at, at + size):
            place(position)[1 if is_copy else 0] += 1
        if is_copy:
            place(at)[2] += 1
            place(at)[3] += size < 64
        at += size
    return [(one[0], one[1], one[2], one[3]) for one in sums]


@settings(max_examples=300)
@given(
    commands=st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=30),
    cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 120)), max_size=20),
    most=st.integers(0, 8),
)
def test_shares_are_those_of_a_plain_count(
    commands: list[tuple[int, bool]], cuts: list[tuple[int, int]], most: int
) -> None:
    size = sum(length for length, _ in commands)
    edges = list(accumulate(part for cut in cuts for part in cut))
    ranges = [
        (start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end <= size
    ]
    target = random.Random(size).randbytes(size)
    plan = ffi.new(
        "od_command[]", [(length, 7 if is_copy else lib.OD_NONE) for length, is_copy in commands]
    )
    members = ffi.new(
        "od_member[]", [{"start": start, "content": start, "end": end} for start, end in ranges]
    )
    shares = ffi.new("od_share[]", len(ranges) + 1)
    changed = lib.od_share_out(plan, len(commands), members, len(ranges), 64, shares)
    expected = counted(commands, ranges)
    assert [(s.literal_bytes, s.copied, s.copies, s.small_copies) for s in shares] == expected
    literals = [one[0] for one in expected[:-1]]
    assert changed == sum(map(bool, literals))

    found = ffi.new("uint64_t[]", most + 1)
    number = lib.od_biggest(shares, len(ranges), most, found)
    by_size = sorted((i for i, size in enumerate(literals) if size), key=lambda i: -literals[i])
    assert list(found[0:number]) == by_size[:most]

    starts = accumulate((length for length, _ in commands), initial=0)
    is_literal = {
        at
        for (n, copy), start in zip(commands, starts, strict=False)
        if not copy
        for at in range(start, start + n)
    }
    for number, (start, end) in enumerate(ranges):
        whole = bytes(target[at] for at in range(start, end) if at in is_literal)
        for skip, room in ((0, 1000), (5, 7), (len(whole), 10), (0, 0)):
            out = ffi.new("uint8_t[]", 1000)
            made = lib.od_literals(
                plan, len(commands), shares + number, members + number, target, skip, out, room
            )
            assert bytes(ffi.buffer(out, made)) == whole[skip : skip + room]


def explained(made: Made) -> ExplainedLayer:
    assert made.layer.explained is not None
    return made.layer.explained


def test_a_built_layer_is_shared_out_exactly() -> None:
    rng = random.Random(7)
    kept = [File(f"kept/{number}", rng.randbytes(3000), 1) for number in range(30)]
    noise = File("opt/noise.bin", rng.randbytes(60_000), 1)
    text = File(
        "opt/text.txt", b" ".join(rng.choices([b"to", b"be", b"or", b"not", b"that"], k=8_000)), 1
    )
    base, target = tar_of(kept), tar_of([*kept[:20], noise, text, *kept[20:]])
    made = build([base], target)
    layer = explained(made)
    assert layer.top[0].name == "opt/noise.bin"
    assert layer.entries == 32
    commands = list(reference.decode(made.stream))
    with tarfile.open(fileobj=BytesIO(target)) as tar:
        ranges = {
            m.name: (m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar.getmembers()
        }
    by_name = dict(
        zip(
            [*ranges, ""],
            counted([(c.size, c.source is not None) for c in commands], list(ranges.values())),
            strict=True,
        )
    )
    for entry in layer.top:
        assert (
            entry.literal_bytes,
            entry.copied_bytes,
            entry.copies,
            entry.small_copies,
        ) == by_name[entry.name]
    assert layer.changed == sum(literal > 0 for name, (literal, *_) in by_name.items() if name)
    parts = [*layer.top, layer.rest]
    assert sum(part.literal_bytes for part in parts) == made.layer.literal_bytes
    assert sum(part.copied_bytes for part in parts) == made.layer.copied_bytes
    assert sum(part.copies for part in parts) == made.layer.copies
    assert sum(part.small_copies for part in parts) == made.layer.small_copies
    # Noise cannot be deflated, text can: the estimate must distinguish them, and add up to the
    # blob's size.
    assert sum(part.wire_bytes for part in parts) == made.layer.size
    (its,) = [entry for entry in layer.top if entry.name == "opt/noise.bin"]
    assert 0.9 * its.literal_bytes < its.wire_bytes < 1.1 * its.literal_bytes


def test_twenty_entries_are_the_limit() -> None:
    rng = random.Random(8)
    new = [File(f"new/{number}", rng.randbytes(100 + number)) for number in range(90)]
    layer = explained(build([tar_of([File("a", b"a")])], tar_of(new)))
    assert len(layer.top) == TOP
    assert layer.changed == 90
    assert layer.rest.literal_bytes > 0
    literals = [entry.literal_bytes for entry in layer.top]
    assert literals == sorted(literals, reverse=True)


@pytest.mark.parametrize(
    "target", [b"", b"no tar at all" * 999, bytes(1024)], ids=["empty", "no tar", "no entries"]
)
def test_a_layer_without_entries_is_all_rest(target: bytes) -> None:
    made = build([tar_of([File("a", b"a")])], target)
    layer = explained(made)
    assert (layer.entries, layer.changed, layer.top) == (0, 0, ())
    assert layer.rest.literal_bytes == made.layer.literal_bytes
    assert layer.rest.wire_bytes == made.layer.size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"usr/bin/python3", "usr/bin/python3"),
        ("späß/日本".encode(), "späß/日本"),
        (b"caf\xe9", r"caf\xe9"),
        (b"a\x1b[31mred\nline", r"a\x1b[31mred\nline"),
        ("right\u202eleft".encode(), r"right\u202eleft"),
        (b"back\\slash", r"back\\slash"),
        ("\U000e0001tag".encode(), r"\U000e0001tag"),
        (b"", ""),
    ],
)
def test_names_are_printable(name: bytes, text: str) -> None:
    assert printable_name(name) == text


@given(st.binary(max_size=400))
def test_any_name_becomes_short_printable_text(name: bytes) -> None:
    text = printable_name(name)
    assert len(text) <= MAX_PRINTED_NAME
    assert text.isprintable()
    assert json.loads(json.dumps(text)) == text
    text.encode("utf-8")


def test_a_long_name_keeps_both_ends() -> None:
    assert (
        printable_name(b"begin/" + b"x" * 500 + b"/end.py")
        == "begin/" + "x" * 93 + "…" + "x" * 92 + "/end.py"
    )


def test_the_report_lists_layers() -> None:
    rng = random.Random(9)
    made = build(
        [tar_of([File("a", b"a" * 5000)])],
        tar_of([File("a", b"a" * 5000), File("b", rng.randbytes(9000))]),
    )
    recorded = {
        "target": str(made.layer.target),
        "size": made.layer.size,
        "copies": made.layer.copies,
        "small_copies": made.layer.small_copies,
        "literal_bytes": made.layer.literal_bytes,
        "copied_bytes": made.layer.copied_bytes,
        "explained": asdict(explained(made)),
    }
    whole = recorded | {
        "size": 200,
        "copies": 1,
        "small_copies": 0,
        "literal_bytes": 0,
        "copied_bytes": 4096,
        "explained": None,
    }
    older = {name: value for name, value in whole.items() if name != "explained"}
    details = json.loads(json.dumps({"common": 2, "layers": [recorded, whole, older]}))
    layers_report = report(details, 100_000, 25_000, top=1)
    assert layers_report.saving == 0.75
    assert layers_report.shared_layers == 2
    assert [layer.number for layer in layers_report.layers] == [3, 4, 5]
    target = made.layer.literal_bytes + made.layer.copied_bytes
    assert layers_report.disk_bytes == target + 2 * 4096
    assert layers_report.copies == made.layer.copies + 2
    assert layers_report.copies_per_mb == pytest.approx(
        layers_report.copies * 1e6 / layers_report.disk_bytes
    )
    (file,) = layers_report.files
    assert (file.layer, file.name, file.size) == (3, "b", 9000)
    assert layers_report.layers[0].rest is not None
    assert (layers_report.layers[1].rest, layers_report.layers[1].files) == (None, ())
    assert report({}, 0, 0).saving == 0.0


_COUNTS = {
    name: st.integers(0, 1 << 50)
    for name in ("literal_bytes", "copied_bytes", "copies", "small_copies", "wire_bytes")
}
_FILES = st.fixed_dictionaries(
    {**_COUNTS, "name": st.text(max_size=20), "size": st.integers(0, 1 << 50)}
)
_EXPLAINED = st.fixed_dictionaries(
    {
        "entries": st.integers(0, 1 << 30),
        "changed": st.integers(0, 1 << 30),
        "top": st.lists(_FILES, max_size=4),
        "rest": st.fixed_dictionaries(_COUNTS),
    }
)
_LAYERS = st.fixed_dictionaries(
    {"target": st.just(f"sha256:{'0' * 64}"), "size": st.integers(0, 1 << 50)},
    optional={
        **{name: values for name, values in _COUNTS.items() if name != "wire_bytes"},
        "explained": st.none() | _EXPLAINED,
        "seconds": st.just({}),
    },
)


@given(
    st.fixed_dictionaries(
        {}, optional={"common": st.integers(0, 9), "layers": st.lists(_LAYERS, max_size=4)}
    ),
    st.integers(0, 1 << 50),
    st.integers(0, 1 << 50),
)
def test_a_report_is_read_from_json_as_it_was_written(
    details: dict[str, object], full: int, delta: int
) -> None:
    """A report is printed from any row, also of older builds and other builders."""
    layers_report = report(details, full, delta, top=3)
    assert report_from_json(json.loads(json.dumps(layers_report.as_json()))) == layers_report
    assert len(layers_report.files) <= 3
    assert layers_report.disk_bytes == layers_report.literal_bytes + layers_report.copied_bytes
