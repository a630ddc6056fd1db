"""Chooses the credentials for each request to the upstream, and the answer to its 401
challenges.
"""

from __future__ import annotations

from collections.abc import Iterable

from obdelta.errors import Denied
from obdelta.registry.auth.challenges import Challenge, parse_challenges
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.auth.tokens import Tokens, Wanted, wanted


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
            self._wanted(self._challenge, credentials, repository, scope)
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
                f"the upstream registry asks for the password of {credentials.user} itself (Basic);"
                " it was not sent: set upstream-basic = yes if it may see it"
            )
        self._challenge = bearer or basic
        if bearer is not None:
            self._tokens.forget(self._wanted(bearer, credentials, repository, scope), refused)
        elif basic is None or credentials.kind != "basic" or refused == credentials:
            raise self.refusal(credentials, repository, scope)
        return await self.present(credentials, repository, scope)

    def _wanted(
        self,
        challenge: Challenge,
        credentials: Credentials,
        repository: str | None,
        scope: str | None,
    ) -> Wanted:
        return wanted(
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
        who = (
            f"{credentials.user}, as which obdelta asks it,"
            if credentials.user
            else "clients without credentials"
        )
        what = "push to" if scope is not None and ",push" in scope else "pull"
        return Denied(f"the upstream registry does not let {who} {what} {repository or 'anything'}")
