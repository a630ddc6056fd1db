"""Errors to HTTP, in one table.

Registry codes are those of the OCI distribution specification, "Error Codes". What a supervisor makes of a status
is in ``docs/wire-protocol.md``: 502 and 504 mean "still processing, ask again", any other 4xx "pull in full".
"""

from __future__ import annotations

import json

from obdelta import errors

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


def registry_body(error: errors.ObdeltaError) -> bytes:
    """The error as a registry tells it; engines show ``errors[].message`` for 4xx."""
    code = next((code for cls, _, code in _TABLE if isinstance(error, cls)), "UNKNOWN")
    return json.dumps({"errors": [{"code": code, "message": str(error), "detail": None}]}).encode() + b"\n"
