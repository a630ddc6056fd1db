"""The PROXY protocol's header, versions 1 and 2, in any chunking.

Source: "The PROXY protocol, versions 1 & 2", HAProxy's ``doc/proxy-protocol.txt``, sections 2.1 and
2.2.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V1_SIGNATURE = b"PROXY "
V1_MAX = 107
"""Bytes of the longest version 1 header, CRLF included."""
V2_MAX = 16 + 4096
"""Bytes of the longest version 2 header that is accepted. Addresses need 52 (216 for Unix sockets);
the rest are TLVs.
"""

_PORT = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)
_V2_LENGTHS = {0: 0, 1: 12, 2: 36, 3: 216}  # family: bytes of the whole address block


class ProxyHeaderInvalid(ValueError):
    """The bytes are no PROXY header, or one that must not be used."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of the connection that the proxy accepted. ``host`` is in canonical form; ``family``
    is 4 or 6.
    """

    host: str
    port: int
    family: int


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """The client and the destination at the proxy. Both are None if the proxy speaks for itself
    (health checks) or does not know.
    """

    source: Endpoint | None = None
    destination: Endpoint | None = None


class ProxyHeaderParser:
    """Parses a header in any chunking, and keeps no more than the longest header."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, chunk: bytes) -> tuple[ProxyHeader, bytes] | None:
        """Returns the header and the bytes after it, or None while more are needed. Raises
        ProxyHeaderInvalid as early as possible.

        Do not call it again after it has returned a header or raised.
        """
        buffer = self._buffer = self._buffer + chunk
        if buffer.startswith(V2_SIGNATURE):
            return self._v2(buffer)
        if buffer.startswith(V1_SIGNATURE):
            return self._v1(buffer)
        if not (V2_SIGNATURE.startswith(buffer) or V1_SIGNATURE.startswith(buffer)):
            raise ProxyHeaderInvalid("there is no PROXY header")
        return None

    def _v1(self, buffer: bytes) -> tuple[ProxyHeader, bytes] | None:
        end = buffer.find(b"\n", 0, V1_MAX)
        if end >= 0:
            if buffer[end - 1 : end] != b"\r":
                raise ProxyHeaderInvalid("the version 1 line does not end in CRLF")
            return _parse_v1(buffer[: end - 1]), buffer[end + 1 :]
        if len(buffer) >= V1_MAX:
            raise ProxyHeaderInvalid(f"the version 1 line does not end within {V1_MAX} bytes")
        return None

    def _v2(self, buffer: bytes) -> tuple[ProxyHeader, bytes] | None:
        head = buffer[12:16]
        if head and head[0] not in (0x20, 0x21):
            raise ProxyHeaderInvalid("neither command LOCAL nor PROXY of version 2")
        if len(head) < 4:
            return None
        local, family, transport = head[0] == 0x20, head[1] >> 4, head[1] & 0x0F
        size = int.from_bytes(head[2:4], "big")
        if 16 + size > V2_MAX:
            raise ProxyHeaderInvalid(f"the version 2 header is longer than {V2_MAX} bytes")
        if not local:
            if family not in _V2_LENGTHS or transport > 1:
                raise ProxyHeaderInvalid("its addresses are not those of a TCP or Unix connection")
            if size < _V2_LENGTHS[family]:
                raise ProxyHeaderInvalid("the version 2 header is too short for its addresses")
        if len(buffer) < 16 + size:
            return None
        header = (
            ProxyHeader() if local or transport == 0 else _parse_v2(family, buffer[16 : 16 + size])
        )
        return header, buffer[16 + size :]


def _parse_v1(line: bytes) -> ProxyHeader:
    try:
        _, protocol, *rest = line.decode("ascii").split(" ")
    except UnicodeDecodeError as error:
        raise ProxyHeaderInvalid("the version 1 line is not ASCII") from error
    if protocol == "UNKNOWN":
        return ProxyHeader()
    if protocol not in ("TCP4", "TCP6") or len(rest) != 4:
        raise ProxyHeaderInvalid("the version 1 line is malformed")
    read = IPv4Address if protocol == "TCP4" else IPv6Address
    source, destination, *ports = rest
    if (
        not all(_PORT.fullmatch(port) and int(port) <= 65535 for port in ports)
        or "%" in source + destination
    ):
        raise ProxyHeaderInvalid("the version 1 line is malformed")
    try:
        return ProxyHeader(
            _end(read(source), int(ports[0])), _end(read(destination), int(ports[1]))
        )
    except AddressValueError as error:
        raise ProxyHeaderInvalid("the version 1 line is malformed") from error


def _parse_v2(family: int, block: bytes) -> ProxyHeader:
    """Parses an address block. The TLVs after the addresses are not used."""
    if family == 1:
        source, destination, source_port, destination_port = struct.unpack_from("!4s4sHH", block)
        return ProxyHeader(
            _end(IPv4Address(source), source_port), _end(IPv4Address(destination), destination_port)
        )
    if family == 2:
        source, destination, source_port, destination_port = struct.unpack_from("!16s16sHH", block)
        return ProxyHeader(
            _end(IPv6Address(source), source_port), _end(IPv6Address(destination), destination_port)
        )
    return (
        ProxyHeader()
    )  # unspecified, or Unix sockets on the proxy's machine: there is no remote client


def _end(address: IPv4Address | IPv6Address, port: int) -> Endpoint:
    # A proxy that listens on both families reports IPv4 clients as ::ffff:a.b.c.d. It is the same
    # client.
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Endpoint(str(address), port, address.version)
