"""Errors to HTTP, in one table.

Registry codes are those of the OCI distribution specification, "Error Codes". What a supervisor
makes of a status is in ``docs/wire-protocol.md``: 502 and 504 mean "still processing, ask again",
any 4xx but 401 "pull in full". Which errors mean the one or the other is decided in
:mod:`obdelta.builds.verdicts` alone.
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
    (errors.Missing, 404, "NAME_UNKNOWN"),
    (errors.Broken, 422, "MANIFEST_INVALID"),
    (errors.UpstreamUnavailable, 502, "UNKNOWN"),
    (errors.Unavailable, 504, "UNKNOWN"),
)


def status_of(error: errors.ObdeltaError) -> int:
    """The HTTP status of an error."""
    return next((status for cls, status, _ in _TABLE if isinstance(error, cls)), 500)


def asks_again(error: errors.ObdeltaError) -> bool:
    """Whether a client of ``/api`` should ask again later."""
    return verdict_of(error).advice is Advice.ASK_AGAIN


def api_status_of(error: errors.ObdeltaError) -> int:
    """The HTTP status of an error below ``/api``: nothing that passes is a 4xx there."""
    if not asks_again(error):
        return status_of(error)
    return 502 if isinstance(error, errors.UpstreamUnavailable | errors.Broken) else 504


def retry_after(error: errors.ObdeltaError) -> int | None:
    """Seconds after which asking again may help (``Retry-After``); None where it cannot.

    One policy for all that passes: what the error itself says, else
    :data:`obdelta.concurrency.limits.RETRY_AFTER`.
    """
    if not isinstance(error, errors.TooManyRequests | errors.Unavailable):
        return None
    said: float | None = getattr(error, "retry_after", None)
    return max(1, round(RETRY_AFTER if said is None else said))


def registry_body(error: errors.ObdeltaError, request: str = "") -> bytes:
    """The error as a registry tells it; engines show ``errors[].message`` for 4xx. ``request``: its
    name in the log.
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
