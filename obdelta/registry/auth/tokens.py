"""Bearer tokens for the server's own credentials: exchanged at the upstream's realm, and cached
until they expire.

Source: distribution's token authentication specification (``docs/spec/auth/token.md``). Only the
registry interprets a token: its expiry is read from the response, never from the token.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode, urlsplit

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from obdelta.errors import Denied, TooManyRequests, UpstreamUnavailable
from obdelta.registry.auth.challenges import Challenge
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.http.redirects import Redirects, split_url
from obdelta.registry.http.retry import Tries
from obdelta.registry.http.transport import Http, HttpResponse, TransientUpstreamError
from obdelta.registry.statuses import retry_after, server_time

log = Logger()

_MAX_ANSWER = 256 * 1024
_DEFAULT_LIFE = 60.0
_MARGIN = 0.1
"""This share of a token's life is left unused: it must still be valid when it arrives."""
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Wanted:
    """The request for a token; equal ones share a token. ``scope`` is as :func:`scope_of` makes it,
    or None.
    """

    credentials: Credentials
    realm: str
    service: str | None
    scope: str | None


def scope_of(repository: str, *, push: bool = False, mount: str | None = None) -> str:
    """Returns ``repository:<name>:pull``, with ``push`` for writes, and with ``mount`` read too.
    Separated by blanks.
    """
    own = f"repository:{repository}:pull" + (",push" if push else "")
    return own if mount is None else f"{own} repository:{mount}:pull"


def wanted(
    challenge: Challenge,
    credentials: Credentials,
    repository: str | None,
    *,
    secure: bool,
    scope: str | None = None,
    disclosure: Disclosure = Disclosure(),  # noqa: B008 - a frozen value
) -> Wanted:
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
        raise UpstreamUnavailable("it asks for a token from a realm that is not a URL") from error
    if parts.fragment:
        raise UpstreamUnavailable("it asks for a token from a realm that is not a URL")
    if secure and parts.scheme != "https":
        raise UpstreamUnavailable(
            f"it asks for a token from {parts.netloc} over plain http; no credentials were sent"
        )
    if credentials.kind == "basic" and not disclosure.realm(parts.hostname or "", parts.netloc):
        raise UpstreamUnavailable(
            f"it asks for a token from {parts.netloc}, which is the host neither of upstream nor of"
            f" auth-realm; the password of {credentials.user} was not sent: name the host in"
            " token-realms if it is right"
        )
    if scope is None and repository is not None:
        scope = scope_of(repository)
    return Wanted(credentials, realm, challenge.parameters.get("service"), scope)


class Tokens:
    """Exchanges and caches tokens; concurrent requests for the same token share one exchange."""

    def __init__(self, http: Http, clock: IReactorTime, tries: Callable[[], Tries]) -> None:
        self._redirects, self._clock, self._tries = Redirects(http), clock, tries
        self._kept: OrderedDict[Wanted, tuple[float, Credentials]] = OrderedDict()
        self._waiting: dict[Wanted, list[Deferred[Credentials]]] = {}
        self._realms: set[str] = set()

    async def token(self, want: Wanted) -> Credentials:
        """Returns a bearer token. Raises Denied if the realm refuses the credentials,
        UpstreamUnavailable, TooManyRequests.
        """
        kept = self._kept.get(want)
        if kept is not None and kept[0] > self._clock.seconds():
            self._kept.move_to_end(want)
            return kept[1]
        mine: Deferred[Credentials] = Deferred()
        waiting = self._waiting.get(want)
        if waiting is not None:
            waiting.append(mine)
        else:
            self._waiting[want] = [mine]
            # A separate task: a waiter that leaves must not cancel the exchange for the others.
            ensureDeferred(self._tries().call(lambda: self._exchange(want))).addBoth(
                self._exchanged, want
            )
        return await mine

    def forget(self, want: Wanted, token: Credentials) -> None:
        """Removes a token that the registry refused, so that it is not used again."""
        kept = self._kept.get(want)
        if kept is not None and kept[1] == token:
            del self._kept[want]

    def _exchanged(self, result: Credentials | Failure, want: Wanted) -> None:
        for waiter in self._waiting.pop(want):
            if waiter.called:
                continue
            if isinstance(result, Failure):
                waiter.errback(result)
            else:
                waiter.callback(result)

    async def _exchange(self, want: Wanted) -> Credentials:
        host = urlsplit(want.realm).netloc
        if host not in self._realms and len(self._realms) < _KEPT:
            self._realms.add(host)
            log.info("tokens for the upstream come from {host}", host=host)
        scopes = (want.scope or "").split()
        service = [] if want.service is None else [("service", want.service)]
        query = urlencode([*service, *(("scope", scope) for scope in scopes)])
        url = want.realm + ("&" if "?" in want.realm else "?") + query if query else want.realm
        headers = Headers({b"accept": [b"application/json"]})
        authorization = want.credentials.header()
        if authorization is not None:
            headers.setRawHeaders(b"authorization", [authorization])
        requested_at = self._clock.seconds()
        # Only the realm is trusted: redirects to another origin are not followed.
        response = await self._redirects.within_origin(b"GET", url, headers)
        content = await response.content(_MAX_ANSWER)
        _check_status(response, want.credentials)
        token, life = _parse(content, response)
        self._kept[want] = (requested_at + life * (1 - _MARGIN), token)
        self._kept.move_to_end(want)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return token


def _check_status(response: HttpResponse, credentials: Credentials) -> None:
    status, host = response.status, response.host
    if status == 429:
        raise TooManyRequests(f"the token server {host} limits our requests", retry_after(response))
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
    return token, max(0.0, float(life) - _age(value.get("issued_at"), server_time(response)))


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
