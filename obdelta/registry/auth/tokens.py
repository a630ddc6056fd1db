"""The upstream's challenges, and Bearer tokens for the server's own credentials: exchanged at the
realm that a challenge names, and cached until they expire.

Only the registry interprets a token: its expiry is read from the response, never from the token.
Sources: distribution's token authentication specification (``docs/spec/auth/token.md``); RFC 9110,
11.2 to 11.6.1 (several challenges in one header, quoted strings, token68).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.concurrency.tasks import SingleFlight
from obdelta.errors import Denied, TooManyRequests, UpstreamUnavailable
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.http.redirects import Redirects, split_url
from obdelta.registry.http.transport import Http, HttpResponse
from obdelta.registry.http.transport_errors import TransientUpstreamError

if TYPE_CHECKING:
    from obdelta.registry.requests import Retrier

log = Logger()

_MAX_ANSWER = 256 * 1024
_DEFAULT_LIFE = 60.0
_UNUSED_SHARE = 0.1
"""This share of a token's life is left unused: it must still be valid when it arrives."""
_MAX_CACHED = 4096
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_WORD})(?:[ \t]+|(?=,)|$)", re.ASCII)
_PARAMETER = re.compile(
    rf'({_WORD})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))', re.ASCII | re.DOTALL
)
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))", re.ASCII)
_BETWEEN = re.compile(r"[ \t]*(?:,[ \t,]*|$)")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_MAX_HEADER = 16 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; scheme and parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[bytes]) -> list[Challenge]:
    """Returns the challenges of all ``WWW-Authenticate`` headers of an untrusted server, in order.
    Parsing of a header stops where it is malformed.
    """
    return [challenge for header in headers for challenge in _parsed(header.decode("latin-1"))]


def _parsed(header: str) -> list[Challenge]:
    found: list[tuple[str, dict[str, str]]] = []
    end = len(header)
    if end > _MAX_HEADER:
        return []
    at = len(header) - len(header.lstrip(" \t,"))
    while at < end:
        parameter = _PARAMETER.match(header, at)
        if parameter is not None and found:
            name, quoted, bare = parameter.groups()
            value = bare if quoted is None else _ESCAPED.sub(r"\1", quoted)
            # The first of two parameters with one name counts, as in Go's and Docker's clients.
            found[-1][1].setdefault(name.lower(), value)
            at = parameter.end()
        elif (scheme := _SCHEME.match(header, at)) is not None:
            found.append((scheme[1].lower(), {}))
            at = scheme.end()
            if _PARAMETER.match(header, at) is not None:
                continue
            if (opaque := _TOKEN68.match(header, at)) is not None:
                at = opaque.end()
        else:
            break
        between = _BETWEEN.match(header, at)
        if between is None:
            break
        at = between.end()
    return [Challenge(scheme, parameters) for scheme, parameters in found]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The request for a token; equal ones share a token. ``scope`` is as :func:`scope_of` makes it,
    or None.
    """

    credentials: Credentials
    realm: str
    service: str | None
    scope: str | None


def scope_of(
    repository: str, *, push: bool = False, delete: bool = False, mount: str | None = None
) -> str:
    """Returns ``repository:<name>:pull``, with ``push`` for writes and ``delete`` for deletions.
    With ``mount``, a scope for reading that repository follows after a blank.
    """
    actions = ["pull", *(["push"] if push else []), *(["delete"] if delete else [])]
    own = f"repository:{repository}:{','.join(actions)}"
    return own if mount is None else f"{own} repository:{mount}:pull"


def token_request(
    challenge: Challenge,
    credentials: Credentials,
    repository: str | None,
    *,
    secure: bool,
    scope: str | None = None,
    disclosure: Disclosure = Disclosure(),  # noqa: B008 - a frozen value
) -> TokenRequest:
    """Returns the token to request for a Bearer challenge, whatever scope it names: ``scope``, or
    pull on the repository.

    Raises UpstreamUnavailable if the realm cannot be trusted with credentials: it is not a URL, or
    plain http though the registry is https (``secure``). A password also goes only to hosts that
    ``disclosure`` names.
    """
    realm = challenge.parameters.get("realm", "")
    try:
        parts = split_url(realm)
    except ValueError as error:
        raise UpstreamUnavailable("its token realm is not a URL") from error
    if parts.fragment:
        raise UpstreamUnavailable("its token realm is not a URL")
    if secure and parts.scheme != "https":
        raise UpstreamUnavailable(
            f"its token server {parts.netloc} uses plain http: no credentials were sent"
        )
    if credentials.kind == "basic" and not disclosure.realm(parts.hostname or "", parts.netloc):
        raise UpstreamUnavailable(
            f"its token server {parts.netloc} is the host of neither upstream nor auth-realm: the"
            f" password of {credentials.user} was not sent: add the host to token-realms if it is"
            " right"
        )
    if scope is None and repository is not None:
        scope = scope_of(repository)
    return TokenRequest(credentials, realm, challenge.parameters.get("service"), scope)


class Tokens:
    """Exchanges and caches tokens; concurrent requests for the same token share one exchange."""

    def __init__(self, http: Http, clock: IReactorTime, retrier: Callable[[], Retrier]) -> None:
        self._redirects, self._clock, self._retrier = Redirects(http), clock, retrier
        self._cached: ExpiringMap[TokenRequest, Credentials] = ExpiringMap(
            _MAX_CACHED, clock.seconds
        )
        self._exchanges: SingleFlight[TokenRequest, Credentials] = SingleFlight()
        self._realms: set[str] = set()

    async def token(self, request: TokenRequest) -> Credentials:
        """Returns a bearer token. Raises Denied if the realm refuses the credentials,
        UpstreamUnavailable, TooManyRequests.
        """
        kept = self._cached.get(request)
        if kept is not None:
            return kept
        return await self._exchanges.do(
            request, lambda: self._retrier().call(lambda: self._exchange(request))
        )

    def forget(self, request: TokenRequest, token: Credentials) -> None:
        """Removes a token that the registry refused, so that it is not used again."""
        if self._cached.get(request) == token:
            self._cached.pop(request)

    async def _exchange(self, request: TokenRequest) -> Credentials:
        host = urlsplit(request.realm).netloc
        if host not in self._realms and len(self._realms) < _MAX_CACHED:
            self._realms.add(host)
            log.info("tokens for the upstream come from {host}", host=host)
        scopes = (request.scope or "").split()
        service = [] if request.service is None else [("service", request.service)]
        query = urlencode([*service, *(("scope", scope) for scope in scopes)])
        url = (
            request.realm + ("&" if "?" in request.realm else "?") + query
            if query
            else request.realm
        )
        headers = Headers({b"accept": [b"application/json"]})
        authorization = request.credentials.header()
        if authorization is not None:
            headers.setRawHeaders(b"authorization", [authorization])
        requested_at = self._clock.seconds()
        # Only the realm is trusted: redirects to another origin are not followed.
        response = await self._redirects.within_origin(b"GET", url, headers)
        content = await response.content(_MAX_ANSWER)
        _check_status(response, request.credentials)
        token, life = _parse(content, response)
        passed = self._clock.seconds() - requested_at
        self._cached.set(request, token, life * (1 - _UNUSED_SHARE) - passed)
        return token


def _check_status(response: HttpResponse, credentials: Credentials) -> None:
    status, host = response.status, response.host
    if status == 429:
        raise TooManyRequests(
            f"the token server {host} limits our requests", response.retry_after()
        )
    if status >= 500:
        raise TransientUpstreamError(f"the token server {host} answered {status}")
    if status in (401, 403):
        whose = (
            f"the configured credentials of {credentials.user}"
            if credentials.user
            else "clients without credentials"
        )
        raise Denied(f"the token server {host} refuses {whose}")
    if status != 200:
        raise UpstreamUnavailable(f"the token server {host} answered {status}")


def _parse(content: bytes | None, response: HttpResponse) -> tuple[Credentials, float]:
    """Returns the token, and for how many seconds from now it may be used."""
    try:
        value = json.loads(content or b"")
        token = Credentials.bearer(value.get("token") or value.get("access_token"))
    except (ValueError, RecursionError, AttributeError, TypeError):
        # Without a cause: the unparsed text may hold a token, which must not reach a log.
        raise UpstreamUnavailable(
            f"the token server {response.host} gave no usable token"
        ) from None
    life = value.get("expires_in")
    if not isinstance(life, int | float) or isinstance(life, bool) or not 0 < life < 1e9:
        life = _DEFAULT_LIFE
    return token, max(0.0, float(life) - _age(value.get("issued_at"), response.date()))


def _age(issued_at: object, now: datetime | None) -> float:
    """Returns the seconds since a cached token was issued, by the token server's clock; 0 if it
    sends no date.
    """
    if not isinstance(issued_at, str) or now is None:
        return 0.0
    try:
        issued = datetime.fromisoformat(issued_at)
    except ValueError:
        return 0.0
    return max(0.0, (now - issued).total_seconds()) if issued.tzinfo is not None else 0.0
