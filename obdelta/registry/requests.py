"""Requests to one registry, with what it wants to see of whom."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta import __version__
from obdelta.errors import SettingsError
from obdelta.registry.auth.authentication import Authentication
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.auth.tokens import Tokens
from obdelta.registry.http.redirects import Answer, Redirects, split_url
from obdelta.registry.http.request_bodies import Body
from obdelta.registry.http.retry import Backoff, Tries
from obdelta.registry.http.transport import Http

_AGENT = f"obdelta/{__version__}".encode("ascii")


class Session:
    """A registry at ``base_url`` (scheme and host, no path); SettingsError where that is something
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
            Tokens(http, clock, self.tries), secure=parts.scheme == "https", disclosure=disclosure
        )

    def tries(self) -> Tries:
        """The attempts at one thing."""
        return Tries(self._backoff, self._clock)

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
        """One request; a 401 to the server's own credentials is answered once, then Denied.

        Redirects are followed where there is no ``body``. ``scope`` as
        :func:`obdelta.registry.auth.tokens.scope_of` makes it; without, pull on ``repository``.
        ``body`` makes a new one for every attempt.
        """
        sent = headers.copy()
        if not sent.hasHeader(b"user-agent"):
            sent.setRawHeaders(b"user-agent", [_AGENT])
        shown = await self._authentication.present(credentials, repository, scope)
        answer = await self._redirects.request(
            method, self._base + path, sent, shown.header(), body and body()
        )
        if not credentials.exchange or answer.foreign or answer.response.status != 401:
            return answer
        await answer.response.discard()
        challenges = answer.response.headers.getRawHeaders(b"www-authenticate") or []
        shown = await self._authentication.after_challenge(
            challenges, credentials, repository, shown, scope
        )
        answer = await self._redirects.request(
            method, self._base + path, sent, shown.header(), body and body()
        )
        if not answer.foreign and answer.response.status == 401:
            await answer.response.discard()
            raise self._authentication.refusal(credentials, repository, scope)
        return answer

    async def close(self) -> None:
        """Close idle connections."""
        await self._http.close()
