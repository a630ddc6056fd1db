"""Headers of proxied requests and responses: which are passed on, and which concern one connection
only.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.web.http_headers import Headers

from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.upstream import ProxiedResponse
from obdelta.registry.verified_body import VerifiedDelivery

# RFC 9110, 7.6.1, and those of older HTTP.
_HOP_BY_HOP = (
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
)
_NOT_FORWARDED = (*_HOP_BY_HOP, b"host", b"authorization", b"cookie", b"content-length", b"expect")
# These concern the upstream's own origin, which the device does not talk to.
_NOT_RETURNED = (*_HOP_BY_HOP, b"set-cookie", b"alt-svc", b"strict-transport-security")


def relay_headers(headers: Headers) -> Headers:
    """Returns a device's headers for the upstream. Several values of one name stay separate."""
    return _without(headers, _NOT_FORWARDED)


def relayed(
    method: bytes, response: HttpResponse, verified: VerifiedDelivery | None = None
) -> ProxiedResponse:
    """Returns the upstream's response to a ``method`` for the device. ``verified`` delivers the
    body if it is hashed.
    """
    headers = _without(response.headers, _NOT_RETURNED)
    # Twisted keeps a body's length apart from the headers, except in response to HEAD.
    if response.length is not None and method != b"HEAD" and response.status not in (204, 304):
        headers.setRawHeaders(b"content-length", [b"%d" % response.length])
    deliver = response.deliver if verified is None else verified.start
    return ProxiedResponse(response.status, headers, response.length, deliver, response.cancel)


def relayed_bytes(response: HttpResponse, content: bytes) -> ProxiedResponse:
    """Returns the upstream's response for the device, with a body that was read already."""
    headers = _without(response.headers, _NOT_RETURNED)
    headers.setRawHeaders(b"content-length", [b"%d" % len(content)])

    def deliver(consumer: IConsumer) -> Deferred[None]:
        consumer.write(content)
        return succeed(None)

    return ProxiedResponse(response.status, headers, len(content), deliver, lambda: None)


def _without(headers: Headers, names: tuple[bytes, ...]) -> Headers:
    kept = headers.copy()
    named = [
        name
        for value in headers.getRawHeaders(b"connection") or []
        for name in value.lower().split(b",")
    ]
    for name in (*names, *(name.strip() for name in named)):
        kept.removeHeader(name)
    return kept
