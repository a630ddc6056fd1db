"""The PROXY header parser: the forms of the specification, any chunking, and invalid headers."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.net.proxy_protocol import (
    V1_MAX,
    V2_MAX,
    V2_SIGNATURE,
    Endpoint,
    ProxyHeader,
    ProxyHeaderInvalid,
    ProxyHeaderParser,
)

HELLO = bytes.fromhex("1603010200010001fc0303") + b"\r\nPROXY "


def v2(
    command: int = 1,
    family: int = 1,
    transport: int = 1,
    block: bytes = b"",
    *,
    length: int | None = None,
) -> bytes:
    size = len(block) if length is None else length
    return (
        V2_SIGNATURE
        + bytes([0x20 | command, family << 4 | transport])
        + struct.pack("!H", size)
        + block
    )


def block4(source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return addresses + struct.pack("!HH", source_port, destination_port)


def block6(source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, one) for one in (source, destination))
    return addresses + struct.pack("!HH", source_port, destination_port)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def feed(chunks: Iterable[bytes]) -> tuple[ProxyHeader, bytes] | None:
    """Returns the parser's result for chunks; those after the header's end count as left over."""
    parser = ProxyHeaderParser()
    chunks = iter(chunks)
    for chunk in chunks:
        result = parser.feed(chunk)
        if result is not None:
            return result[0], result[1] + b"".join(chunks)
    return None


def bytewise(data: bytes) -> Iterable[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


V4 = ProxyHeader(Endpoint("192.0.2.7", 56324, 4), Endpoint("198.51.100.1", 443, 4))
V6 = ProxyHeader(Endpoint("2001:db8::7", 1, 6), Endpoint("2001:db8::1", 65535, 6))
B4 = block4("192.0.2.7", "198.51.100.1", 56324, 443)
B6 = block6("2001:db8::7", "2001:db8::1", 1, 65535)
UNIX = (b"/run/a".ljust(108, b"\0")) + (b"/run/b".ljust(108, b"\0"))

GOOD: dict[str, tuple[bytes, ProxyHeader]] = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n", V4),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::7 2001:DB8:0:0:0:0:0:1 1 65535\r\n", V6),
    "v1 port 0": (
        b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n",
        ProxyHeader(Endpoint("0.0.0.0", 0, 4), Endpoint("0.0.0.0", 0, 4)),
    ),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", ProxyHeader()),
    "v1 UNKNOWN with addresses": (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", ProxyHeader()),
    "v1 the longest": (b"PROXY UNKNOWN " + b"f" * (V1_MAX - 16) + b"\r\n", ProxyHeader()),
    "v1 a mapped address": (
        b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 56324 443\r\n",
        V4,
    ),
    "v2 TCP4": (v2(block=B4), V4),
    "v2 TCP6": (v2(family=2, block=B6), V6),
    "v2 a mapped address": (
        v2(family=2, block=block6("::ffff:192.0.2.7", "::ffff:198.51.100.1", 56324, 443)),
        V4,
    ),
    "v2 with TLVs": (
        v2(
            block=B4
            + tlv(0x01, b"http/1.1")
            + tlv(0x02, b"delta.example.com")
            + tlv(0x04, bytes(40))
        ),
        V4,
    ),
    "v2 with what is no TLV": (v2(block=B4 + b"\xff\xff"), V4),
    "v2 the longest": (v2(block=B4 + bytes(V2_MAX - 16 - 12)), V4),
    "v2 LOCAL": (v2(command=0, family=0, transport=0), ProxyHeader()),
    "v2 LOCAL with addresses": (v2(command=0, block=B4), ProxyHeader()),
    "v2 LOCAL with TLVs": (
        v2(command=0, family=0, transport=0, block=tlv(0x20, bytes(9))),
        ProxyHeader(),
    ),
    "v2 UNSPEC": (v2(family=0, transport=0), ProxyHeader()),
    "v2 UNSPEC with bytes": (v2(family=0, transport=0, block=b"whatever"), ProxyHeader()),
    "v2 Unix": (v2(family=3, block=UNIX), ProxyHeader()),
}

BAD: dict[str, bytes] = {
    "a ClientHello": HELLO,
    "a request": b"GET /v2/ HTTP/1.1\r\n\r\n",
    "blanks before": b" PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
    "lower case": b"proxy TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
    "v1 without a protocol": b"PROXY \r\n",
    "v1 of UDP": b"PROXY UDP4 192.0.2.7 198.51.100.1 56324 443\r\n",
    "v1 UNKNOWN run on": b"PROXY UNKNOWNX\r\n",
    "v1 with a field less": b"PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
    "v1 with a field more": b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 1\r\n",
    "v1 with two blanks": b"PROXY TCP4  192.0.2.7 198.51.100.1 56324 443\r\n",
    "v1 with a tab": b"PROXY\tTCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
    "v1 of another family": b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
    "v1 of the other family": b"PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
    "v1 with a name": b"PROXY TCP4 localhost 198.51.100.1 1 2\r\n",
    "v1 with a scope": b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n",
    "v1 with a leading zero": b"PROXY TCP4 192.0.2.07 198.51.100.1 1 2\r\n",
    "v1 with a port too high": b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n",
    "v1 with a negative port": b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n",
    "v1 with a port 007": b"PROXY TCP4 192.0.2.7 198.51.100.1 007 443\r\n",
    "v1 with another digit": "PROXY TCP4 192.0.2.7 198.51.100.1 ٣ 443\r\n".encode(),
    "v1 that ends in a line feed": b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\n",
    "v1 with a line feed inside": b"PROXY UNKNOWN \n\r\n",
    "v1 too long": b"PROXY UNKNOWN " + b"f" * (V1_MAX - 15) + b"\r\n",
    "v1 without an end": b"PROXY UNKNOWN " + b"f" * 5000,
    "v2 of version 1": V2_SIGNATURE + b"\x11\x11\0\x0c" + B4,
    "v2 of version 3": V2_SIGNATURE + b"\x31\x11\0\x0c" + B4,
    "v2 with command 2": v2(command=2, block=B4),
    "v2 of datagrams": v2(transport=2, block=B4),
    "v2 of transport 3": v2(transport=3, block=B4),
    "v2 of family 4": v2(family=4, block=bytes(300)),
    "v2 too short for TCP4": v2(block=B4[:-1]),
    "v2 too short for TCP6": v2(family=2, block=B4),
    "v2 too short for Unix": v2(family=3, block=UNIX[:-1]),
    "v2 too long": v2(block=B4 + bytes(V2_MAX - 16 - 11)),
    "v2 as long as can be": v2(length=65535) + bytes(65535),
    "v2 LOCAL too long": v2(command=0, length=65535),
    "a broken signature": V2_SIGNATURE[:-1] + b"\r" + b"\x21\x11\0\x0c" + B4,
}


@pytest.mark.parametrize(("header", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good_headers_give_the_client(header: bytes, expected: ProxyHeader) -> None:
    assert feed([header]) == (expected, b"")
    assert feed([header + HELLO]) == (expected, HELLO)
    assert feed(bytewise(header + HELLO)) == (expected, HELLO)
    for at in range(len(header)):
        assert feed([header[:at]]) is None, "a part of a header is not yet one"
    for at in range(0, len(header) + len(HELLO), 7):
        whole = header + HELLO
        assert feed([whole[:at], whole[at:]]) == (expected, HELLO)


@pytest.mark.parametrize("header", BAD.values(), ids=BAD.keys())
def test_bad_headers_are_refused(header: bytes) -> None:
    with pytest.raises(ProxyHeaderInvalid):
        feed([header])
    with pytest.raises(ProxyHeaderInvalid):
        feed(bytewise(header))


def verdict(chunks: Iterable[bytes]) -> object:
    try:
        return feed(chunks)
    except ProxyHeaderInvalid:
        return ProxyHeaderInvalid


TCP4_ADDRESSES = st.ip_addresses(v=4).map(str)
TCP6_ADDRESSES = st.ip_addresses(v=6).map(str)
PORTS = st.integers(0, 65535)
TLVS = st.lists(st.builds(tlv, st.integers(0, 255), st.binary(max_size=300)), max_size=8).map(
    b"".join
)
ENDS4 = st.tuples(TCP4_ADDRESSES, TCP4_ADDRESSES, PORTS, PORTS)
ENDS6 = st.tuples(TCP6_ADDRESSES, TCP6_ADDRESSES, PORTS, PORTS)
HEADERS = st.one_of(
    ENDS4.map(lambda ends: "PROXY TCP4 {} {} {} {}\r\n".format(*ends).encode()),
    ENDS6.map(lambda ends: "PROXY TCP6 {} {} {} {}\r\n".format(*ends).encode()),
    st.builds(lambda ends, tlvs: v2(block=block4(*ends) + tlvs), ENDS4, TLVS),
    st.builds(lambda ends, tlvs: v2(family=2, block=block6(*ends) + tlvs), ENDS6, TLVS),
    st.sampled_from([header for header, _ in GOOD.values()] + list(BAD.values())),
)


@given(HEADERS, st.binary(max_size=40), st.lists(st.integers(0, 4000), max_size=6))
def test_chunking_changes_nothing(header: bytes, rest: bytes, cuts: list[int]) -> None:
    whole = header + rest
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(edges)]
    assert verdict(pieces) == verdict([whole])


@given(HEADERS, st.data())
def test_no_bytes_break_the_parser(header: bytes, data: st.DataObject) -> None:
    """Changed headers are valid, incomplete, or invalid, in any chunks; memory is bounded."""
    broken = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken)))
        broken[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    found = verdict([bytes(broken)])
    assert verdict(bytewise(bytes(broken))) == found
    if found is None:
        assert len(broken) < V2_MAX
    elif isinstance(found, tuple):
        assert bytes(broken).endswith(found[1])
        assert (found[0].source is None) == (found[0].destination is None)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_parsed(noise: bytes) -> None:
    assert verdict(bytewise(noise)) == verdict([noise])
    assert verdict([V2_SIGNATURE + noise]) == verdict(bytewise(V2_SIGNATURE + noise))
