"""Checks whether a registry has a blob, and its size, without a download.

Many registries and proxies refuse HEAD on blobs, or redirect it to storage whose URL is signed for
GET alone. Their response then says nothing about the blob, so a GET follows whose body is not read.
"""

from __future__ import annotations

from twisted.web.http_headers import Headers

from obdelta.errors import BlobUnknown
from obdelta.oci import Digest
from obdelta.registry.auth.credentials import Credentials
from obdelta.registry.http.redirects import Answer
from obdelta.registry.http.retry import Tries
from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.requests import Session
from obdelta.registry.statuses import error_of

_LONGEST = 18
"""Most digits of a size."""


async def blob_size(
    session: Session,
    repository: str,
    digest: Digest,
    credentials: Credentials,
    tries: Tries,
    *,
    scope: str | None = None,
) -> int | None:
    """Returns the size of a blob that the repository has, or None if the registry does not report
    it.

    ``scope`` as for :meth:`Session.send`. Raises BlobUnknown, and what a download raises.
    """
    path = f"/v2/{repository}/blobs/{digest}"
    method = b"HEAD"

    async def probe() -> int | None:
        nonlocal method
        answer = await session.send(method, path, Headers(), credentials, repository, scope=scope)
        if method == b"HEAD" and get_may_succeed(answer):
            await answer.response.discard()
            method = b"GET"
            answer = await session.send(
                method, path, Headers(), credentials, repository, scope=scope
            )
        if answer.response.status != 200:
            method = b"GET"
            raise await error_of(answer, repository, BlobUnknown(digest))
        size = announced_size(answer.response)
        answer.response.cancel()
        return size

    return await tries.call(probe)


def get_may_succeed(answer: Answer) -> bool:
    """Returns whether a GET may succeed although this HEAD of a blob failed.

    Final are success, the registry's own 401, 403 and 404, and rate limits, which are waited for.
    """
    status = answer.response.status
    if 200 <= status < 300 or status in (304, 412, 416, 429):
        return False
    return answer.foreign or status not in (401, 403, 404, 410)


def announced_size(response: HttpResponse) -> int | None:
    """Returns the size of the body that a response announces, also in response to HEAD.

    Zero counts as unknown: some registries answer every HEAD so.
    """
    length = response.header(b"content-length") or ""
    if length.isascii() and length.isdigit() and len(length) <= _LONGEST:
        return int(length) or None
    return response.length or None
