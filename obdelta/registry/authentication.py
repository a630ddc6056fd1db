"""What is shown to the upstream with each request, and what is done when it wants something else."""

from __future__ import annotations

from collections.abc import Iterable

from obdelta.errors import Denied
from obdelta.registry.challenges import Challenge, parse_challenges
from obdelta.registry.credentials import Credentials
from obdelta.registry.tokens import Tokens, wanted


class Authentication:
    """Remembers how the upstream wants to be asked. A device's credentials pass through it untouched."""

    def __init__(self, tokens: Tokens, *, secure: bool) -> None:
        self._tokens, self._secure = tokens, secure
        self._challenge: Challenge | None = None

    async def present(self, credentials: Credentials, repository: str | None, scope: str | None = None) -> Credentials:
        """What to send: a device's credentials as they are; of the server's own, only what the upstream has asked for.

        ``scope`` as :func:`obdelta.registry.tokens.scope_of` makes it; None: pull on ``repository``.
        """
        if not credentials.exchange:
            return credentials
        if self._challenge is None:
            return Credentials.anonymous()
        if self._challenge.scheme == "basic":
            return credentials
        want = wanted(self._challenge, credentials, repository, secure=self._secure, scope=scope)
        return await self._tokens.token(want)

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
        bearer = next((c for c in challenges if c.scheme == "bearer" and "realm" in c.parameters), None)
        basic = next((c for c in challenges if c.scheme == "basic"), None)
        self._challenge = bearer or basic
        if bearer is not None:
            want = wanted(bearer, credentials, repository, secure=self._secure, scope=scope)
            self._tokens.forget(want, refused)
        elif basic is None or credentials.kind != "basic" or refused == credentials:
            raise self.refusal(credentials, repository, scope)
        return await self.present(credentials, repository, scope)

    def refusal(self, credentials: Credentials, repository: str | None, scope: str | None = None) -> Denied:
        """The error for the server's own credentials that do not reach: to a device it must not look like its own 401."""
        who = f"{credentials.user}, as which obdelta asks it," if credentials.user else "askers without credentials"
        what = "push to" if scope is not None and ",push" in scope else "pull"
        return Denied(f"the upstream registry does not let {who} {what} {repository or 'anything'}")
