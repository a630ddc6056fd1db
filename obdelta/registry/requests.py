"""Sends requests to one registry: credentials or a token for them, redirects, and answers to
challenges (401).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta import __version__
from obdelta.errors import Denied, SettingsError
from obdelta.registry.auth.challenges import Challenge, parse_challenges
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.auth.tokens import TokenRequest, Tokens, token_request
from obdelta.registry.http.redirects import Answer, Redirects, split_url
from obdelta.registry.http.request_bodies import Body
from obdelta.registry.http.retry import Backoff, Retrier
from obdelta.registry.http.transport import Http


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
