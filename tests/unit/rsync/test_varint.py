"""Numbers of rsync's file list."""

from __future__ import annotations

import pytest

from obdelta.rsync import varint


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b"\x00", 0),
        (b"\x7f", 127),
        (b"\x80\x80", 128),
        (b"\xbf\xff", 0x3FFF),
        (b"\xf0\xff\xff\xff\xff", -1),
        (b"\xf0\x00\x00\x00\x80", -(1 << 31)),
    ],
)
def test_varints_are_read(encoded: bytes, value: int) -> None:
    assert varint.read_varint(encoded, 0) == (value, len(encoded))
    for length in range(len(encoded)):
        with pytest.raises(IndexError):
            varint.read_varint(encoded[:length], 0)


def test_varlongs_are_read() -> None:
    assert varint.read_varlong(b"\x00\x31\x01", 0, 3) == (0x131, 3)
    assert varint.read_varlong(b"\x10\x3b\x00\xca\x9a"[:4], 0, 4) == (0x10CA003B, 4)
    assert varint.read_varlong(b"\x80\xff\xff\xff", 0, 3) == (0xFFFFFF, 4)
    with pytest.raises(ValueError):
        varint.read_varlong(b"\xfc" + bytes(20), 0, 4)
