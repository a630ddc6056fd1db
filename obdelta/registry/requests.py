"""Sends requests to one registry: credentials or a token for them, redirects, answers to challenges
(401), when the next attempt is due, and errors for unsuccessful statuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from random import SystemRandom
from typing import TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from obdelta import __version__
from obdelta.errors import (
    BadRequest,
    Denied,
    Missing,
    NameUnknown,
    ObdeltaError,
    SettingsError,
    TooManyRequests,
    Unauthorized,
    UpstreamUnavailable,
)
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.auth.tokens import (
    Challenge,
    TokenRequest,
    Tokens,
    parse_challenges,
    token_request,
)
from obdelta.registry.http.redirects import Answer, Redirects, split_url
from obdelta.registry.http.request_bodies import Body
from obdelta.registry.http.transport import Http
from obdelta.registry.http.transport_errors import TransientUpstreamError

log = Logger()

T = TypeVar("T")

_chance = SystemRandom().random
_MAX_ERROR = 64 * 1024
_CODE = re.compile(r"[A-Z_]{1,40}", re.ASCII)
_PASSING = frozenset((408, 425, 500, 502, 503, 504))


@dataclass(frozen=True, slots=True)
class Backoff:
    """The limits of retries.

    ``attempts`` in all. The first wait is ``first`` seconds, then twice that, up to ``most``; each
    is shortened at random to between a half and the whole. A ``Retry-After`` is obeyed up to
    ``max_retry_after`` seconds; a longer one ends the retries. No retry starts later than
    ``time_limit`` seconds after the first attempt or the last progress.
    """

    attempts: int = 5
    first: float = 0.5
    most: float = 10.0
    max_retry_after: float = 30.0
    time_limit: float = 90.0


class Retrier:
    """The attempts at one operation."""

    def __init__(
        self, backoff: Backoff, clock: IReactorTime, chance: Callable[[], float] = _chance
    ) -> None:
        self._backoff, self._clock, self._chance = backoff, clock, chance
        self.progressed()

    def progressed(self) -> None:
        """Resets the count of failures, and restarts the time limit."""
        self._failures = 0
        self._since = self._clock.seconds()

    async def wait(self, error: TransientUpstreamError | TooManyRequests) -> None:
        """Waits until the next attempt is due; raises ``error`` if there is none."""
        backoff = self._backoff
        self._failures += 1
        requested = error.retry_after or 0.0 if isinstance(error, TooManyRequests) else 0.0
        late = self._clock.seconds() - self._since >= backoff.time_limit
        if self._failures >= backoff.attempts or late or requested > backoff.max_retry_after:
            raise error
        delay = min(backoff.first * 2 ** (self._failures - 1), backoff.most) * (
            0.5 + self._chance() / 2
        )
        delay = max(delay, requested)
        log.info("{error}: retry in {delay:.1f} s", error=str(error), delay=delay)
        await deferLater(self._clock, delay)

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Returns the operation's result, once an attempt succeeds."""
        while True:
            try:
                return await operation()
            except (TransientUpstreamError, TooManyRequests) as error:
                await self.wait(error)


class Authentication:
    """Remembers the upstream's challenge. A device's credentials pass through unchanged."""

    def __init__(self, tokens: Tokens, *, secure: bool, disclosure: Disclosure) -> None:
        self._tokens, self._secure, self._disclosure = tokens, secure, disclosure
        self._challenge: Challenge | None = None

    async def present(
        self, credentials: Credentials, repository: str | None, scope: str | None = None
    ) -> Credentials:
        """Returns the credentials to send: a device's unchanged; the server's own only as far as
        the upstream requires them.

        ``scope`` as :func:`obdelta.registry.auth.tokens.scope_of` makes it; None: pull on
        ``repository``.
        """
        if not credentials.exchange:
            return credentials
        if self._challenge is None:
            return Credentials.anonymous()
        if self._challenge.scheme == "basic":
            return credentials
        return await self._tokens.token(
            self._token_request(self._challenge, credentials, repository, scope)
        )

    async def after_challenge(
        self,
        headers: Iterable[bytes],
        credentials: Credentials,
        repository: str | None,
        refused: Credentials,
        scope: str | None = None,
    ) -> Credentials:
        """Returns the credentials to send after a 401 to ``refused``. Raises Denied if there are no
        others.
        """
        challenges = parse_challenges(headers)
        bearer = next(
            (c for c in challenges if c.scheme == "bearer" and "realm" in c.parameters), None
        )
        basic = next((c for c in challenges if c.scheme == "basic"), None)
        if (
            bearer is None
            and basic is not None
            and credentials.kind == "basic"
            and not self._disclosure.basic
        ):
            raise Denied(
                f"the upstream registry itself requests the password of {credentials.user} (Basic):"
                " it was not sent: set upstream-credentials = basic to send it"
            )
        self._challenge = bearer or basic
        if bearer is not None:
            self._tokens.forget(
                self._token_request(bearer, credentials, repository, scope), refused
            )
        elif basic is None or credentials.kind != "basic" or refused == credentials:
            raise self.refusal(credentials, repository, scope)
        return await self.present(credentials, repository, scope)

    def _token_request(
        self,
        challenge: Challenge,
        credentials: Credentials,
        repository: str | None,
        scope: str | None,
    ) -> TokenRequest:
        return token_request(
            challenge,
            credentials,
            repository,
            secure=self._secure,
            scope=scope,
            disclosure=self._disclosure,
        )

    def refusal(
        self, credentials: Credentials, repository: str | None, scope: str | None = None
    ) -> Denied:
        """Returns the error for insufficient credentials of the server: a device must not take it
        for its own 401.
        """
        client = (
            f"{credentials.user} (the credentials of obdelta)"
            if credentials.user
            else "clients without credentials"
        )
        action = "push to" if scope is not None and ",push" in scope else "pull"
        if scope is not None and scope.endswith(",delete"):
            action = "delete from"
        return Denied(
            f"the upstream registry does not let {client} {action} {repository or 'anything'}"
        )


_AGENT = f"obdelta/{__version__}".encode("ascii")


class Session:
    """A registry at ``base_url`` (scheme and host, no path). Raises SettingsError for anything
    else.
    """

    def __init__(
        self,
        base_url: str,
        http: Http,
        clock: IReactorTime,
        backoff: Backoff,
        disclosure: Disclosure,
    ) -> None:
        try:
            parts = split_url(base_url)
        except ValueError as error:
            raise SettingsError(
                "upstream", base_url, "a URL like https://registry.example.com"
            ) from error
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise SettingsError("upstream", base_url, "a URL without path, query and fragment")
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._http, self._clock, self._backoff = http, clock, backoff
        self._redirects = Redirects(http)
        self._authentication = Authentication(
            Tokens(http, clock, self.retrier), secure=parts.scheme == "https", disclosure=disclosure
        )

    def retrier(self) -> Retrier:
        """Returns the attempts at one operation."""
        return Retrier(self._backoff, self._clock)

    async def send(
        self,
        method: bytes,
        path: str,
        headers: Headers,
        credentials: Credentials,
        repository: str | None,
        *,
        scope: str | None = None,
        body: Callable[[], Body] | None = None,
    ) -> Answer:
        """Sends one request. A 401 to the server's own credentials is answered once, then Denied is
        raised.

        Redirects are followed unless there is a ``body``. ``scope`` as
        :func:`obdelta.registry.auth.tokens.scope_of` makes it; None: pull on ``repository``.
        ``body`` returns a new body for every attempt.
        """
        sent = headers.copy()
        if not sent.hasHeader(b"user-agent"):
            sent.setRawHeaders(b"user-agent", [_AGENT])
        presented = await self._authentication.present(credentials, repository, scope)
        answer = await self._redirects.request(
            method, self._base + path, sent, presented.header(), body and body()
        )
        if not credentials.exchange or answer.foreign or answer.response.status != 401:
            return answer
        await answer.response.discard()
        challenges = answer.response.headers.getRawHeaders(b"www-authenticate") or []
        presented = await self._authentication.after_challenge(
            challenges, credentials, repository, presented, scope
        )
        answer = await self._redirects.request(
            method, self._base + path, sent, presented.header(), body and body()
        )
        if not answer.foreign and answer.response.status == 401:
            await answer.response.discard()
            raise self._authentication.refusal(credentials, repository, scope)
        return answer

    async def close(self) -> None:
        """Closes idle connections."""
        await self._http.close()


async def error_of(answer: Answer, repository: str, missing: Missing) -> ObdeltaError:
    """Returns the error for an unsuccessful status, after reading the body. ``missing`` is the
    meaning of a plain 404.

    Source: OCI distribution specification, "Error Codes".
    """
    response, status = answer.response, answer.response.status
    challenges = response.headers.getRawHeaders(b"www-authenticate") or []
    codes = _codes(await response.content(_MAX_ERROR) or b"")
    message = f"{response.host} answered {status}" + (f" ({', '.join(codes)})" if codes else "")
    if status in (404, 410):
        return NameUnknown(repository) if "NAME_UNKNOWN" in codes else missing
    if status == 429:
        return TooManyRequests(f"{response.host} limits our requests", response.retry_after())
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
