"""The stream reader compared with a plain reference: any commands, any cut, any damage."""

from __future__ import annotations

import hashlib
import io
import itertools
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from obdelta.delta.apply import patch
from obdelta.delta.kernel.binding import NONE, ffi, lib
from obdelta.errors import StreamInvalid
from obdelta.oci import DiffID
from tests.support import delta_reference as reference
from tests.support.delta import layer_file
from tests.support.delta_reference import Command

BASE = bytes(itertools.chain.from_iterable((i % 251, i // 251) for i in range(40_000)))
CUTS = (0, 1, 700, 700, 66_000, len(BASE))
"""The positions where BASE is cut into layers; one of them is empty."""


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("base")
    return [layer_file(BASE[a:b], folder).path for a, b in itertools.pairwise(CUTS)]


class Trickle(io.BytesIO):
    """A file that gives a few bytes at a time."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._most if size is None or size < 0 else min(size, self._most))


def apply(layers: list[Path], stream: bytes, most: int = 1 << 20) -> bytes:
    out = io.BytesIO()
    files = [layer_file(path.read_bytes(), path.parent) for path in layers]
    found = patch(files, Trickle(stream, most), out)
    assert found == DiffID.of(out.getvalue())
    return out.getvalue()


LITERALS = st.binary(min_size=1, max_size=90).map(
    lambda content: Command(len(content), None, content)
)
COPIES = st.builds(
    lambda source, size: Command(min(size, len(BASE) - source), source),
    st.one_of(st.integers(0, 300), st.integers(0, len(BASE) - 1)),
    st.one_of(st.integers(1, 300), st.integers(1, 70_000)),
)


@given(st.lists(st.one_of(LITERALS, COPIES), max_size=12), st.sampled_from([1, 3, 4096]))
def test_any_commands_are_read_as_written(
    layers: list[Path], commands: list[Command], most: int
) -> None:
    stream = reference.encode(commands)
    assert apply(layers, stream, most) == reference.apply(BASE, stream)


@given(st.lists(st.one_of(LITERALS, COPIES), min_size=1, max_size=6), st.data())
def test_any_damage_is_refused_or_harmless(
    layers: list[Path], commands: list[Command], data: st.DataObject
) -> None:
    """Streams are truncated, changed or extended: both readers refuse, or both give the same."""
    stream = bytearray(reference.encode(commands))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    del stream[data.draw(st.integers(0, len(stream))) :]
    stream += data.draw(st.binary(max_size=3))
    try:
        expected = reference.apply(BASE, bytes(stream))
    except StreamInvalid:
        with pytest.raises(StreamInvalid):
            apply(layers, bytes(stream))
        return
    assert apply(layers, bytes(stream)) == expected


M = reference.MAGIC
REFUSED = [
    (b"", 0, "truncated"),
    (M[:3], 3, "truncated"),
    (b"rs\x02\x37\x00", 4, "magic"),
    (M, 4, "truncated"),
    (M + b"\x55", 5, "unknown command"),
    (M + b"\xff", 5, "unknown command"),
    (M + b"\x05abcd", 9, "truncated"),
    (M + b"\x44" + b"\x80" + bytes(7), 13, "negative"),
    (M + b"\x54" + b"\xff" * 8 + bytes(7) + b"\x01", 21, "negative"),
    (M + b"\x54" + bytes(8) + b"\xff" * 8, 21, "negative"),
    (M + b"\x45\x00\x00", 7, "empty copy"),
    (M + b"\x4d" + len(BASE).to_bytes(4, "big") + b"\x01", 10, "leaves the base"),
    (M + b"\x54" + b"\x7f" + b"\xff" * 7 + b"\x7f" + b"\xff" * 7, 21, "leaves the base"),
    (M + b"\x00x", 5, "follow its end"),
    (M + b"\x44" + b"\x7f" + b"\xff" * 7 + b"abc", 16, "truncated"),
]


@pytest.mark.parametrize(("stream", "offset", "why"), REFUSED)
@pytest.mark.parametrize("most", [1, 1 << 20])
def test_broken_streams_are_refused_with_the_position(
    layers: list[Path], stream: bytes, offset: int, why: str, most: int
) -> None:
    with pytest.raises(StreamInvalid, match=why) as failure:
        apply(layers, stream, most)
    assert failure.value.offset == offset


def test_copy_across_all_layers_and_one_file_as_base(layers: list[Path], tmp_path: Path) -> None:
    stream = reference.encode([Command(len(BASE), 0)])
    assert apply(layers, stream) == BASE
    whole = tmp_path / "whole"
    whole.write_bytes(BASE)
    assert patch(whole, io.BytesIO(stream), None).hex == hashlib.sha256(BASE).hexdigest()


@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(1, 70), st.integers(1, 70_000)),
            st.one_of(st.none(), st.integers(0, 1 << 39)),
        ),
        max_size=12,
    )
)
@example(
    [
        (64, None),
        (65, None),
        (255, 255),
        (256, 256),
        (65_535, 65_535),
        (65_536, 65_536),
        (1 << 32, 1 << 32),
    ]
)
def test_commands_are_encoded_as_the_format_says(commands: list[tuple[int, int | None]]) -> None:
    """The kernel writes the same bytes as the reference, in pieces of complete commands."""
    size = sum(size for size, _ in commands)
    target = BASE * (1 + min(size, 1 << 20) // len(BASE))
    c_commands = ffi.new(
        "od_command[]", [(size, NONE if source is None else source) for size, source in commands]
    )
    at, following = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    buffer = ffi.new("uint8_t[]", 70_016)
    made, expected, place = b"", [], 0
    for number, source in commands:
        expected.append(
            Command(number, source, b"" if source is not None else target[place : place + number])
        )
        place += number
    while following[0] < len(commands):
        before = following[0]
        # `size` may exceed the target: only literals are read from it
        written = lib.od_encode(
            c_commands,
            len(commands),
            following,
            ffi.from_buffer(target),
            max(size, len(target)),
            at,
            buffer,
            70_016,
        )
        made += bytes(ffi.buffer(buffer, written))
        assert following[0] > before
    assert reference.MAGIC + made + b"\0" == reference.encode(expected)
    assert lib.od_encoded_size(c_commands, len(commands)) == len(made)
    tally = ffi.new("od_tally *")
    lib.od_count(c_commands, len(commands), 64, tally)
    assert tally.copies == sum(source is not None for _, source in commands)
    assert tally.copied + tally.literal_bytes == size


def test_a_literal_that_leaves_the_target_is_not_written() -> None:
    commands = ffi.new("od_command[]", [(10, NONE)])
    at, following, buffer = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("uint8_t[]", 64)
    assert (
        lib.od_encode(commands, 1, following, ffi.from_buffer(b"too short"), 9, at, buffer, 64) == 0
    )
    assert following[0] == 0
