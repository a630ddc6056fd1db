"""Decides which repositories a client may pull (``docs/access.md``).

Handlers call :meth:`Access.authorize` before any look-up, so cached answers are refused as new ones
are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from obdelta.errors import Denied, SettingsError, Unauthorized, joined
from obdelta.oci.reference import is_repository
from obdelta.web.devices.access.token_keys import load_keys
from obdelta.web.devices.access.token_verifier import (
    PULL,
    ExaminedToken,
    Grant,
    TokenExpired,
    TokenInvalid,
    Verifier,
)


class Access(Protocol):
    """Decides on a request's ``Authorization`` header."""

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Returns the client's grant if it has ``pull`` on all repositories in ``needs``. Any valid
        token will do if ``needs`` is empty.

        With ``aliases`` a name in ``needs`` may be an alias. The caller must then fetch from
        ``grant.repository(name)``. The alias itself may be another repository that was never
        granted.

        Raises Unauthorized (401, with its challenge) if the token is missing or invalid. Raises
        Denied (403) if a valid token does not grant enough.
        """


class OpenAccess:
    """``auth = none``: every client may pull everything. Credentials are ignored."""

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Returns an unlimited grant."""
        return Grant()


class Expired(Unauthorized):
    """A token refused only because it expired: signature, issuer, audience and shape are valid.
    ``token`` is its hash.
    """

    def __init__(self, why: str, challenge: str, grant: Grant, token: str) -> None:
        self.grant, self.token = grant, token
        super().__init__(why, challenge)


class TokenAccess:
    """``auth = token``: requires a Bearer token of the configured issuer.

    The challenge tells clients where to get a token (``realm``) and for which service
    (``service``).
    """

    def __init__(self, verifier: Verifier, *, realm: str, service: str) -> None:
        self._verifier, self._realm, self._service = verifier, realm, service

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Implements :meth:`Access.authorize`."""
        if authorization is None:
            raise Unauthorized("a token is needed", self.challenge(needs))
        scheme, _, token = authorization.strip(b" \t").partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthorized("a Bearer token is needed", self.challenge(needs))
        try:
            grant = self._verifier.verify(token.strip(b" \t"))
        except TokenExpired as error:
            challenge = self.challenge(needs, error="invalid_token")
            raise Expired(str(error), challenge, error.grant, token_hash(authorization)) from None
        except TokenInvalid as error:
            raise Unauthorized(str(error), self.challenge(needs, error="invalid_token")) from None
        for name in needs:
            if not grant.allows(grant.repository(name) if aliases else name):
                raise Denied(f"the token does not allow {PULL} on {_printable(name)}")
        return grant

    def examine(self, token: bytes) -> ExaminedToken:
        """Returns why a token is refused, claim by claim, for operators."""
        return self._verifier.examine(token)

    def reload(self) -> list[str]:
        """Reads the keys again, even if their file has not changed. Returns why that failed."""
        return self._verifier.reload()

    def challenge(self, needs: Sequence[str], *, error: str | None = None) -> str:
        """Returns the ``WWW-Authenticate`` value for a request that needs these repositories (RFC
        6750, section 3).
        """
        parameters = [("realm", self._realm), ("service", self._service)]
        scopes = [
            f"repository:{name}:{PULL}" for name in dict.fromkeys(needs) if is_repository(name)
        ]
        if scopes:
            parameters.append(("scope", " ".join(scopes)))
        if error is not None:
            parameters.append(("error", error))
        return "Bearer " + ",".join(f'{name}="{value}"' for name, value in parameters)


def token_access(
    *,
    key: Path | bytes | None,
    algorithms: Collection[str],
    issuer: str | None,
    audiences: Collection[str] | None,
    realm: str | None,
    service: str | None,
    now: Callable[[], float],
) -> TokenAccess:
    """Returns the access of ``auth = token``. Raises SettingsError, with a remedy, for a missing or
    unusable setting.
    """
    errors = []
    if key is None:
        errors.append(
            SettingsError(
                "auth-key",
                None,
                "the API's public key: a file (openBalena's /certs/private/api.<domain>.pem, which"
                " BALENA_TLD selects), or TOKEN_AUTH_CERT_PUB; auth = none lets every client pull"
                " everything",
            )
        )
    for name, value in (
        ("issuer", issuer),
        ("audience", audiences),
        ("realm", realm),
    ):
        if not value:
            errors.append(
                SettingsError(
                    f"auth-{name}",
                    None,
                    "a value, or BALENA_TLD in the environment, from which it follows",
                )
            )
    if errors:
        raise joined(errors)
    assert key and issuer and audiences and realm and service  # noqa: S101 - for the type checker
    verifier = Verifier(
        load_keys(key, algorithms, now), issuer=issuer, audiences=audiences, now=now
    )
    return TokenAccess(verifier, realm=realm, service=service)


def token_hash(authorization: bytes) -> str:
    """Returns the hash of a header's token, which names the token without revealing it."""
    return hashlib.sha256(authorization.strip(b" \t").partition(b" ")[2].strip(b" \t")).hexdigest()


def _printable(name: str) -> str:
    return name if is_repository(name) else "the requested repository"
