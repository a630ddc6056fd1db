"""Sends requests to one registry: credentials, redirects and answers to challenges."""

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
            Tokens(http, clock, self.tries), secure=parts.scheme == "https", disclosure=disclosure
        )

    def tries(self) -> Tries:
        """Returns the attempts at one operation."""
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
        """Sends one request. A 401 to the server's own credentials is answered once, then Denied is
        raised.

        Redirects are followed unless there is a ``body``. ``scope`` as
        :func:`obdelta.registry.auth.tokens.scope_of` makes it; None: pull on ``repository``.
        ``body`` makes a new one for every attempt.
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
