"""Follows redirects, and decides which origins get credentials."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from twisted.logger import Logger
from twisted.web.http_headers import Headers

from obdelta.errors import UpstreamUnavailable
from obdelta.registry.http.request_bodies import Body
from obdelta.registry.http.transport import Http, HttpResponse

log = Logger()

MAX_HOPS = 5
_MAX_LOGGED_ORIGINS = 1000
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_PORTS = {"http": 80, "https": 443}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NETLOC = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?", re.ASCII)


def split_url(url: str) -> SplitResult:
    """Parses an absolute http or https URL without user name and password; ValueError for anything
    else.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("not a URL")
    parts = urlsplit(url)
    # The property checks the port's range.
    if parts.scheme not in _PORTS or _NETLOC.fullmatch(parts.netloc) is None or parts.port == 0:
        raise ValueError("not an http or https URL of a host")
    return parts


def origin(url: str) -> tuple[str, str, int]:
    """Returns scheme, host and port; credentials for one origin are not for another. ValueError as
    :func:`split_url`.
    """
    parts = split_url(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS[parts.scheme]


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a ``Location``. ``authorization``: from its user name and password, if it has
    them.
    """

    url: str
    authorization: bytes | None


def follow(url: str, location: str) -> Target:
    """Resolves a ``Location`` header against the URL that it came from, as Go's client does.

    Blanks and bytes beyond ASCII are percent-encoded. A host beyond ASCII becomes its IDNA form,
    and the fragment is dropped. ``location`` is the header's bytes as Latin-1. ValueError if it
    leads nowhere.
    """
    if _CONTROL.search(location):
        raise ValueError("a control character")
    parts = urlsplit(urljoin(url, location))
    userinfo, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        host = host.encode("latin-1").decode("utf-8").encode("idna").decode("ascii")
    path = parts.path or "/"
    clean = _encoded(f"{parts.scheme}://{host}{path}" + (f"?{parts.query}" if parts.query else ""))
    split_url(clean)
    if not at:
        return Target(clean, None)
    login = unquote_to_bytes(userinfo) if ":" in userinfo else unquote_to_bytes(userinfo) + b":"
    return Target(clean, b"Basic " + base64.b64encode(login))


def _encoded(url: str) -> str:
    return re.sub(r"[^!-~]", lambda found: f"%{ord(found[0]):02X}", url)


@dataclass(frozen=True, slots=True)
class Answer:
    """The last response of a chain of redirects. ``foreign``: its origin differs from that of the
    first request.
    """

    response: HttpResponse
    foreign: bool


class Redirects:
    """Sends requests and follows their redirects. ``Authorization`` stays at the origin that it was
    given for.
    """

    def __init__(self, http: Http) -> None:
        self._http = http
        self._seen: set[str] = set()

    async def request(
        self,
        method: bytes,
        url: str,
        headers: Headers,
        authorization: bytes | None,
        body: Body | None = None,
    ) -> Answer:
        """Sends a request, with all headers on every redirect (``Range`` too) except
        ``authorization``. Raises what :meth:`Http.request` raises.

        A user name and password in a ``Location`` are sent only to its origin. Redirects of a
        request with a body are not followed: the redirect is returned.
        """
        home = origin(url)
        foreign = False
        login: bytes | None = None
        for _ in range(MAX_HOPS + 1):
            sent = headers.copy()
            sent.removeHeader(b"authorization")
            # Never again after another origin: that host may have chosen a redirect back.
            presented = authorization if authorization is not None and not foreign else login
            if presented is not None:
                sent.setRawHeaders(b"authorization", [presented])
            response = await self._http.request(method, url, sent, body)
            if response.status not in _REDIRECTS or body is not None:
                return Answer(response, foreign)
            await response.discard()
            target = self._next(url, response)
            if target.authorization is not None or origin(target.url) != origin(url):
                login = target.authorization
            url = target.url
            foreign = foreign or origin(url) != home
        raise UpstreamUnavailable(f"{urlsplit(url).netloc} redirects more than {MAX_HOPS} times")

    async def within_origin(self, method: bytes, url: str, headers: Headers) -> HttpResponse:
        """Sends a request and follows its redirects only within the origin; any other redirect is
        returned.
        """
        home = origin(url)
        for _ in range(MAX_HOPS + 1):
            response = await self._http.request(method, url, headers)
            if response.status not in _REDIRECTS:
                return response
            try:
                target = follow(url, response.header(b"location") or "")
            except ValueError:
                return response
            if origin(target.url) != home or not response.header(b"location"):
                return response
            await response.discard()
            url = target.url
        raise UpstreamUnavailable(f"{urlsplit(url).netloc} redirects more than {MAX_HOPS} times")

    def _next(self, url: str, response: HttpResponse) -> Target:
        location = response.header(b"location")
        if not location:
            raise UpstreamUnavailable(f"{response.host} redirects without a Location")
        try:
            following = follow(url, location)
        except ValueError as error:
            raise UpstreamUnavailable(f"{response.host} redirects to an invalid URL") from error
        scheme, host, _ = origin(following.url)
        if host not in self._seen and len(self._seen) < _MAX_LOGGED_ORIGINS:
            self._seen.add(host)
            if scheme == "http" and url.startswith("https:"):
                # As engines do. Digests reveal every change on the way, but do not hide the
                # contents.
                log.warn(
                    "{upstream} redirects from https to plain http on {host}",
                    upstream=response.host,
                    host=host,
                )
            elif host != origin(url)[1]:
                log.info("{upstream} redirects to {host}", upstream=response.host, host=host)
        return following
