"""Range requests of devices: parses ``Range`` and ``If-Range`` headers (RFC 9110, section 14)."""

from __future__ import annotations

import re

from twisted.web.http import Request

_RANGE = re.compile(rb"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class RangeNotSatisfiable(Exception):
    """A syntactically valid range that lies outside the body (416)."""


def parse_range(header: bytes | None, size: int) -> tuple[int, int] | None:
    """Returns ``(start, length)`` of a single byte range within ``size`` bytes, or None for the
    whole body.

    Anything but one well-formed range is ignored, as RFC 9110 section 14.2 allows. The range unit
    is case-insensitive (section 14.1). Raises RangeNotSatisfiable.
    """
    if header is None:
        return None
    match = _RANGE.fullmatch(header.strip().replace(b" ", b"").lower())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        if length == 0:
            raise RangeNotSatisfiable
        return size - length, length
    start = int(match[1])
    end = min(int(match[2]), size - 1) if match[2] else size - 1
    if match[2] and int(match[2]) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable
    return start, end - start + 1


def single_range(request: Request) -> bytes | None:
    """Returns the ``Range`` header, or None if it is missing or occurs several times."""
    values = request.requestHeaders.getRawHeaders(b"range", [])
    return values[0] if len(values) == 1 else None


def requested_range(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Returns the requested range, or None for the whole body. An ``If-Range`` with another
    validator means the whole body. Raises RangeNotSatisfiable.
    """
    condition = request.getHeader(b"if-range")
    if condition is not None and condition.strip() != etag.encode("ascii"):
        return None
    return parse_range(single_range(request), size)


def bounded_range(request: Request) -> tuple[int, int] | None:
    """Returns ``bytes=a-b`` of a GET as ``(a, b + 1)``, or None for anything else."""
    header = single_range(request)
    if (
        header is None
        or request.method != b"GET"
        or header.rstrip().endswith(b"-")
        or b"=-" in header
    ):
        return None
    try:
        found = parse_range(header, 1 << 60)
    except RangeNotSatisfiable:
        return None
    return None if found is None else (found[0], found[0] + found[1])
