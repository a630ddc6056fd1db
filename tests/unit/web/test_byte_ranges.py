"""``Range`` headers, parsed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.web.devices.byte_ranges import RangeNotSatisfiable, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        (b"bytes=0-", (0, 100)),
        (b"bytes=0-0", (0, 1)),
        (b"bytes=99-", (99, 1)),
        (b"bytes=10-19", (10, 10)),
        (b"bytes=90-1000", (90, 10)),
        (b"bytes=-1", (99, 1)),
        (b"bytes=-1000", (0, 100)),
        (b"bytes= 5-6", (5, 2)),
        # RFC 9110 lets a server ignore ranges that it does not support.
        (b"bytes=0-1,3-4", None),
        (b"bytes=5-4", None),
        (b"bytes=-", None),
        (b"items=0-1", None),
        (b"bytes=a-b", None),
        (b"bytes=" + b"9" * 40 + b"-", None),
    ],
)
def test_ranges_are_parsed(header: bytes | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == expected


@pytest.mark.parametrize(
    "header", [b"bytes=100-", b"bytes=100-200", b"bytes=-0", b"bytes=999999999999999999-"]
)
def test_an_unsatisfiable_range_is_refused(header: bytes) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, 100)


@given(st.binary(max_size=40), st.integers(0, 1 << 40))
def test_any_header_gives_a_range_inside_or_none(header: bytes, size: int) -> None:
    for text in (header, b"bytes=" + header):
        try:
            found = parse_range(text, size)
        except RangeNotSatisfiable:
            continue
        if found is not None:
            start, length = found
            assert 0 <= start < size
            assert 0 < length <= size - start
