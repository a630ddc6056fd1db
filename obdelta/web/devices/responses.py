"""Sends bodies to devices: complete files, files that are still being written, and responses of
other servers.

Every copied body has a producer, so a slow device pauses its source and memory use stays flat. A
body that fails is cut: an incomplete body never ends as if it were whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

import deflate
from twisted.web.http import OK, Request

from obdelta.net.http_limits import phrase_of
from obdelta.observability.logging import REQUEST_ID_HEADER
from obdelta.registry import ProxiedResponse
from obdelta.store.growing_file import GrowingFile
from obdelta.web.devices.byte_ranges import RangeNotSatisfiable, requested_range
from obdelta.web.devices.file_body import DownloadPace, FileBody, Insertion, deliver_inserted
from obdelta.web.request import abort

LARGEST_DOCUMENT = 256 * 1024
"""Bytes up to which a document is compressed for a client: the reactor does it."""
_SMALL_DOCUMENT = 32 * 1024
"""Bytes up to which that takes less than 0.2 ms at a good level; larger ones get a fast level."""
_GZIP = re.compile(rb"\s*gzip\s*(?:;(?!\s*q\s*=\s*0(?:\.0*)?\s*$).*)?", re.S)
"""The coding in ``Accept-Encoding``, unless its weight is 0 (RFC 9110, 12.5.3)."""
_GOOD_LEVEL, _FAST_LEVEL = 6, 1
BINARY: Mapping[bytes, bytes] = {b"content-type": b"application/octet-stream"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete, immutable file, open for one response. ``size`` includes the ``insertion``, if
    there is one.

    ``etag`` includes its quotes and identifies the body with its insertion. ``document``: whether
    it is small, and text. ``pace`` follows the download, unless only a range is sent.
    """

    file: BinaryIO
    size: int
    etag: str
    headers: Mapping[bytes, bytes]
    insertion: Insertion | None = None
    document: bool = False
    pace: DownloadPace | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        size: int,
        etag: str,
        headers: Mapping[bytes, bytes],
        insertion: Insertion | None = None,
        *,
        document: bool = False,
        pace: DownloadPace | None = None,
    ) -> Self:
        """Opens a file of ``size`` bytes. Raises FileNotFoundError if it is missing or has another
        size.
        """
        file = path.open("rb")
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            raise FileNotFoundError(f"{path.name} does not have its {size} bytes")
        if insertion is not None:
            size += len(insertion.content)
        return cls(file, size, etag, headers, insertion, document, pace)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Growing:
    """A file of known size and content that is still being written.

    ``open`` starts or joins the work that writes it, ``release`` leaves that work again. With
    ``proxy_instead``, the upstream can answer too if the work fails before its first byte. ``size``
    and ``etag`` include the ``insertion``, if there is one.
    """

    open: Callable[[], Awaitable[GrowingFile]]
    size: int
    etag: str
    headers: Mapping[bytes, bytes]
    release: Callable[[], None] = field(default=_nothing)
    proxy_instead: bool = False
    insertion: Insertion | None = None


async def send(request: Request, body: Stored | Growing) -> None:
    """Sends a body (GET and HEAD, ranges too) and ends the request.

    A failure before the first byte is raised with nothing sent. Later failures cut the connection.
    """
    if isinstance(body, Stored):
        send_stored(request, body)
        return
    try:
        await _send_growing(request, body)
    finally:
        body.release()


def send_document(request: Request, content: bytes, etag: str) -> None:
    """Sends a small JSON document (GET and HEAD) and ends the request. ``etag`` includes its
    quotes.
    """
    vary_by(request, b"Accept-Encoding")
    packed = _packed(content) if _takes_gzip(request) else content
    if packed is not content:
        request.setHeader(b"content-encoding", b"gzip")
        etag = f'{etag[:-1]}-gzip"'
    if not_modified(request, etag):
        return
    request.setHeader(b"content-length", str(len(packed)).encode("ascii"))
    if request.method != b"HEAD":
        request.write(packed)
    request.finish()


def vary_by(request: Request, header: bytes) -> None:
    """Declares that the response to this URL depends on a header of the request."""
    known = request.responseHeaders.getRawHeaders(b"vary", [])
    if header not in b", ".join(known).split(b", "):
        request.responseHeaders.setRawHeaders(b"vary", [b", ".join([*known, header])])


def _takes_gzip(request: Request) -> bool:
    """Returns whether the client takes the whole body in gzip. Ranges are of the bare bytes."""
    codings = (request.getHeader(b"accept-encoding") or b"").lower().split(b",")
    return request.getHeader(b"range") is None and any(map(_GZIP.fullmatch, codings))


def _packed(content: bytes) -> bytes:
    """Returns the content in gzip, or itself if that saves nothing."""
    level = _GOOD_LEVEL if len(content) <= _SMALL_DOCUMENT else _FAST_LEVEL
    packed = bytes(deflate.gzip_compress(content, level))
    return packed if len(packed) < len(content) else content


def send_stored(request: Request, body: Stored) -> None:
    """Begins a complete file's body, which ends the request later."""
    if body.document and _takes_gzip(request):
        with body.file:
            content = body.file.read()
        for name, value in body.headers.items():
            request.setHeader(name, value)
        send_document(request, content, body.etag)
        return
    part = _send_head(request, body.size, body.etag, body.headers)
    if part is None:
        body.file.close()
        return
    whole = request.code == OK
    FileBody(request, body.file, *part, body.insertion, body.pace if whole else None).begin()


async def _send_growing(request: Request, body: Growing) -> None:
    if request.method == b"HEAD" or _needs_no_body(request, body):
        _send_head(request, body.size, body.etag, body.headers)
        return
    file = await body.open()
    part, insertion = requested_range(request, body.size, body.etag), body.insertion
    start = 0 if part is None else part[0]
    await file.reached(start if insertion is None else insertion.in_file(start))
    part = _send_head(request, body.size, body.etag, body.headers)
    if part is None:
        return
    start, stop = part[0], part[0] + part[1]
    with ends_whole(request):
        if insertion is None:
            await file.deliver(request, start, stop)
        else:
            await deliver_inserted(request, file, start, stop, insertion)


def _needs_no_body(request: Request, body: Growing) -> bool:
    """Returns whether the answer is 304 or 416. Nothing is built or fetched for it."""
    try:
        requested_range(request, body.size, body.etag)
    except RangeNotSatisfiable:
        return True
    return _is_known(request, body.etag)


@contextmanager
def ends_whole(request: Request) -> Iterator[None]:
    """Ends the request after its body. Cuts the connection if the body fails: nothing else shows
    that it is incomplete.
    """
    try:
        yield
    except BaseException:
        abort(request)
        raise
    request.finish()


def not_modified(request: Request, etag: str) -> bool:
    """Sets the ``etag`` header (quotes included). Answers 304 and returns True if ``If-None-Match``
    names it.
    """
    request.setHeader(b"etag", etag.encode("ascii"))
    if not _is_known(request, etag):
        return False
    request.setResponseCode(304)
    request.finish()
    return True


def _is_known(request: Request, etag: str) -> bool:
    """Returns whether ``If-None-Match`` names the content."""
    known = (request.getHeader(b"if-none-match") or b"").split(b",")
    return bool({etag.encode("ascii"), b"*"} & {tag.strip().removeprefix(b"W/") for tag in known})


def _send_head(
    request: Request, size: int, etag: str, headers: Mapping[bytes, bytes]
) -> tuple[int, int] | None:
    for name, value in headers.items():
        request.setHeader(name, value)
    return send_range_head(request, size, etag)


def send_range_head(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Sends status and headers of an immutable body of ``size`` bytes (GET and HEAD, ranges too).
    ``etag`` includes its quotes.

    Returns ``(start, length)`` of the body to send. Returns None if there is none; the request has
    then been ended.
    """
    request.setHeader(b"accept-ranges", b"bytes")
    if not_modified(request, etag):
        return None
    try:
        part = requested_range(request, size, etag)
    except RangeNotSatisfiable:
        request.setResponseCode(416)
        request.setHeader(b"content-range", f"bytes */{size}".encode("ascii"))
        request.setHeader(b"content-length", b"0")
        request.finish()
        return None
    start, length = part if part is not None else (0, size)
    if part is not None:
        request.setResponseCode(206)
        request.setHeader(
            b"content-range", f"bytes {start}-{start + length - 1}/{size}".encode("ascii")
        )
    request.setHeader(b"content-length", str(length).encode("ascii"))
    if request.method == b"HEAD" or length == 0:
        request.finish()
        return None
    return start, length


async def send_proxied(request: Request, response: ProxiedResponse) -> None:
    """Sends another server's response; its body streams at the device's pace."""
    request.setResponseCode(response.status, phrase_of(response.status))
    for name, values in response.headers.getAllRawHeaders():
        if name.lower() == b"vary":
            for value in b",".join(values).split(b","):
                vary_by(request, value.strip())
        elif name.lower() != REQUEST_ID_HEADER:  # this server sets the request's own ID
            request.responseHeaders.setRawHeaders(name, values)
    if request.method == b"HEAD":
        response.cancel()
        request.finish()
        return
    try:
        await response.deliver(request)
    except BaseException:
        response.cancel()
        if request.startedWriting:
            abort(request)
        raise
    request.finish()
