"""Turns the upstream's error statuses into exceptions, and reads ``Retry-After`` and ``Date``.

Source: OCI distribution specification, "Error Codes"; RFC 9110 for ``Retry-After``.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from email.utils import parsedate_to_datetime

from obdelta.errors import (
    BadRequest,
    Denied,
    Missing,
    NameUnknown,
    ObdeltaError,
    TooManyRequests,
    Unauthorized,
    UpstreamUnavailable,
)
from obdelta.registry.http.redirects import Answer
from obdelta.registry.http.transport import HttpResponse, TransientUpstreamError

_MAX_ERROR = 64 * 1024
_CODE = re.compile(r"[A-Z_]{1,40}", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)
_PASSING = frozenset((408, 425, 500, 502, 503, 504))


async def error_of(answer: Answer, repository: str, missing: Missing) -> ObdeltaError:
    """Returns the error for an unsuccessful status, after reading the body. ``missing`` is the
    meaning of a plain 404.
    """
    response, status = answer.response, answer.response.status
    challenges = response.headers.getRawHeaders(b"www-authenticate") or []
    codes = _codes(await response.content(_MAX_ERROR) or b"")
    message = f"{response.host} answered {status}" + (f" ({', '.join(codes)})" if codes else "")
    if status in (404, 410):
        return NameUnknown(repository) if "NAME_UNKNOWN" in codes else missing
    if status == 429:
        return TooManyRequests(f"{response.host} limits our requests", retry_after(response))
    if status in _PASSING:
        return TransientUpstreamError(message)
    if answer.foreign:
        # The registry decided on access; storage that refuses its redirect is a failure that may
        # pass.
        return TransientUpstreamError(message)
    if status == 401:
        challenge = ", ".join(header.decode("latin-1") for header in challenges)
        return Unauthorized(
            f"the upstream registry requires credentials for {repository}", challenge or None
        )
    if status == 403:
        return Denied(f"the upstream registry refuses {repository}")
    if status == 400 and codes:
        return BadRequest(f"the upstream registry refuses the request ({', '.join(codes)})")
    return UpstreamUnavailable(message)


def _codes(body: bytes) -> list[str]:
    """Returns ``errors[].code`` of a registry's error body; empty if it is something else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return []
    errors = value.get("errors") if isinstance(value, dict) else None
    codes = (
        [entry.get("code") for entry in errors[:8] if isinstance(entry, dict)]
        if isinstance(errors, list)
        else []
    )
    return [code for code in codes if isinstance(code, str) and _CODE.fullmatch(code)]


def server_time(response: HttpResponse) -> datetime | None:
    """Returns the response's ``Date``: times in it are compared with this, not with our own
    clock.
    """
    return _http_date(response.header(b"date"))


def retry_after(response: HttpResponse) -> float | None:
    """Returns the seconds that ``Retry-After`` requests, None if it is missing or invalid."""
    value = response.header(b"retry-after")
    if value is None:
        return None
    if _SECONDS.fullmatch(value):
        return float(value)
    now, then = server_time(response), _http_date(value)
    return max(0.0, (then - now).total_seconds()) if now is not None and then is not None else None


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value) if value else None
    except (ValueError, OverflowError):
        return None
    return date if date is not None and date.tzinfo is not None else None
