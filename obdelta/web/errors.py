"""Maps obdelta's errors to HTTP statuses and registry error codes, in one table.

Registry codes are those of the OCI distribution specification, "Error Codes".
``docs/wire-protocol.md`` describes how supervisors treat a status. 502 and 504 mean "still
processing, ask again". Any 4xx but 401 means "pull in full". Only :mod:`obdelta.builds.verdicts`
decides which errors mean which.
"""

from __future__ import annotations

import json

from obdelta import errors
from obdelta.builds.verdicts import Advice, verdict_of
from obdelta.concurrency.limits import RETRY_AFTER

_TABLE: tuple[tuple[type[errors.ObdeltaError], int, str], ...] = (
    (errors.BadDigest, 400, "DIGEST_INVALID"),
    (errors.BadRequest, 400, "NAME_INVALID"),
    (errors.Unauthorized, 401, "UNAUTHORIZED"),
    (errors.Denied, 403, "DENIED"),
    (errors.TooManyRequests, 429, "TOOMANYREQUESTS"),
    (errors.NameUnknown, 404, "NAME_UNKNOWN"),
    (errors.ManifestUnknown, 404, "MANIFEST_UNKNOWN"),
    (errors.BlobUnknown, 404, "BLOB_UNKNOWN"),
    (errors.FormUnreadable, 404, "BLOB_UNKNOWN"),
    (errors.Missing, 404, "NAME_UNKNOWN"),
    (errors.Broken, 422, "MANIFEST_INVALID"),
    (errors.UpstreamUnavailable, 502, "UNKNOWN"),
    (errors.Unavailable, 504, "UNKNOWN"),
)


def status_of(error: errors.ObdeltaError) -> int:
    """Returns the HTTP status of an error."""
    return next((status for cls, status, _ in _TABLE if isinstance(error, cls)), 500)


def is_retryable(error: errors.ObdeltaError) -> bool:
    """Returns whether a client of ``/api`` should retry later."""
    return verdict_of(error).advice is Advice.RETRY


def api_status_of(error: errors.ObdeltaError) -> int:
    """Returns the HTTP status of an error below ``/api``. A temporary error is never a
    4xx there.
    """
    if not is_retryable(error):
        return status_of(error)
    return 502 if isinstance(error, errors.UpstreamUnavailable | errors.Broken) else 504


def retry_after(error: errors.ObdeltaError) -> int | None:
    """Returns the seconds after which a retry may help (``Retry-After``), or None if it cannot.

    The error's own value counts, else :data:`obdelta.concurrency.limits.RETRY_AFTER`.
    """
    if not isinstance(error, errors.TooManyRequests | errors.Unavailable):
        return None
    given: float | None = getattr(error, "retry_after", None)
    return max(1, round(RETRY_AFTER if given is None else given))


def registry_body(error: errors.ObdeltaError, request: str = "") -> bytes:
    """Returns the error as a registry's JSON body. Engines display ``errors[].message`` for 4xx.
    ``request`` is the request ID.
    """
    code = next((code for cls, _, code in _TABLE if isinstance(error, cls)), "UNKNOWN")
    return (
        json.dumps(
            {
                "errors": [
                    {
                        "code": code,
                        "message": str(error),
                        "detail": {"request": request} if request else None,
                    }
                ]
            }
        ).encode()
        + b"\n"
    )
