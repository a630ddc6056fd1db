"""What is shown to the upstream with each request, and what is done when it wants something else."""

from __future__ import annotations

from collections.abc import Iterable

from obdelta.errors import Denied
from obdelta.registry.auth.challenges import Challenge, parse_challenges
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.auth.tokens import Tokens, Wanted, wanted


class Authentication:
    """Remembers how the upstream wants to be asked. A device's credentials pass through it
    untouched.
    """

    def __init__(self, tokens: Tokens, *, secure: bool, disclosure: Disclosure) -> None:
        self._tokens, self._secure, self._disclosure = tokens, secure, disclosure
        self._challenge: Challenge | None = None

    async def present(
        self, credentials: Credentials, repository: str | None, scope: str | None = None
    ) -> Credentials:
        """What to send: a device's credentials as they are; of the server's own, only what the
        upstream has asked for.

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
        """What to send after a 401 to ``refused``; Denied if there is nothing else to offer."""
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
        """The error for the server's own credentials that do not reach: to a device it must not
        look like its own 401.
        """
        who = (
            f"{credentials.user}, as which obdelta asks it,"
            if credentials.user
            else "clients without credentials"
        )
        what = "push to" if scope is not None and ",push" in scope else "pull"
        return Denied(f"the upstream registry does not let {who} {what} {repository or 'anything'}")
