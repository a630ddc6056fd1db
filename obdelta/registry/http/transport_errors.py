"""Errors of connections to the upstream, as errors that say whether a retry may help."""

from __future__ import annotations

from twisted.internet.defer import CancelledError
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
)
from twisted.python.failure import Failure
from twisted.web.client import RequestGenerationFailed, RequestTransmissionFailed, ResponseFailed

from obdelta.errors import UpstreamUnavailable
from obdelta.registry.addresses import RefusedAddress
from obdelta.registry.http.tls import TLS_ERRORS, tls_failure

_MAX_CAUSES = 16
TRANSPORT_ERRORS = (
    CancelledError,
    ConnectError,
    ConnectionClosed,
    DNSLookupError,
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseFailed,
    *TLS_ERRORS,
)
"""Errors with which a request through Twisted fails."""


class TransientUpstreamError(UpstreamUnavailable):
    """A failure that a retry may avoid: a dropped connection, a timeout, 502."""


class WrongContent(TransientUpstreamError):
    """A body that does not match its digest: an error page, a truncated body, damage.

    It says nothing about the blob or manifest itself. The caller starts over, without the received
    bytes.
    """


def translated(error: Exception, host: str) -> tuple[str | None, Exception]:
    """Returns the label to count it under (None: cancelled, no failure), and the error to raise."""
    causes = _causes(error)
    for cause in causes:
        match cause:
            case CancelledError() | ConnectingCancelledError():
                return None, CancelledError()
            case RefusedAddress(host=refused, kind=kind):
                return "connection", UpstreamUnavailable(
                    f"it leads to {refused}, which has a {kind} address: add it to"
                    " upstream-redirects to allow this"
                )
        if (why := tls_failure(cause, host)) is not None:
            return "tls", UpstreamUnavailable(why)
    if any(isinstance(cause, DNSLookupError) for cause in causes):
        return "name", TransientUpstreamError(f"the name of {host} cannot be resolved")
    if any(isinstance(cause, ConnectError) for cause in causes):
        return "connection", TransientUpstreamError(f"cannot connect to {host}")
    return "dropped", TransientUpstreamError(
        f"{host} dropped the connection or sent something that is not HTTP"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Returns the error and those that Twisted wrapped in it."""
    found: list[BaseException] = [error]
    for cause in found:
        reasons = getattr(cause, "reasons", None)
        if isinstance(reasons, list) and len(found) < _MAX_CAUSES:
            found += [
                reason.value
                for reason in reasons
                if isinstance(reason, Failure) and reason.value is not None
            ]
    return found
