"""Headers on their way through: what goes on, and what concerns one connection only."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.web.http_headers import Headers

from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.upstream import ProxiedResponse
from obdelta.registry.verified_body import VerifiedDelivery

# RFC 9110, 7.6.1, and what older HTTP had besides.
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
# These speak of the upstream's own origin, which the device does not talk to.
_NOT_RETURNED = (*_HOP_BY_HOP, b"set-cookie", b"alt-svc", b"strict-transport-security")


def relay_headers(headers: Headers) -> Headers:
    """A device's headers as they go to the upstream, several values of one name staying several."""
    return _without(headers, _NOT_FORWARDED)


def relayed(
    method: bytes, response: HttpResponse, verified: VerifiedDelivery | None = None
) -> ProxiedResponse:
    """The upstream's answer to a ``method`` as it goes to the device. ``verified`` delivers it,
    where it is hashed.
    """
    headers = _without(response.headers, _NOT_RETURNED)
    # Twisted keeps a body's length apart from the headers; what a HEAD's answer says of it stays
    # among them.
    if response.length is not None and method != b"HEAD" and response.status not in (204, 304):
        headers.setRawHeaders(b"content-length", [b"%d" % response.length])
    deliver = response.deliver if verified is None else verified.start
    return ProxiedResponse(response.status, headers, response.length, deliver, response.cancel)


def relayed_bytes(response: HttpResponse, content: bytes) -> ProxiedResponse:
    """The upstream's answer, its body read already, as it goes to the device."""
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
