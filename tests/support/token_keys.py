"""Keys of several types, and requests with tokens that they sign, at a time that the test sets."""

from __future__ import annotations

from typing import Any

from obdelta.web.devices.access.admission import TokenAccess
from obdelta.web.devices.access.token_keys import (
    Keys,
)
from obdelta.web.devices.access.token_verifier import Grant, Verifier
from tests.support.tokens import (
    AUDIENCE,
    ISSUER,
    Issuer,
    pulls,
)

ISSUERS = {name: Issuer(name) for name in ("ES256", "ES384", "ES512", "RS256", "EdDSA")}
OURS, OTHER = ISSUERS["ES256"], Issuer()
NOW = 1_800_000_000.0


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = NOW

    def __call__(self) -> float:
        return self.seconds


def access_with(keys: Keys, clock: Clock) -> TokenAccess:
    """Returns access for tokens that these keys verify."""
    return TokenAccess(
        Verifier(keys, issuer=ISSUER, audiences=[AUDIENCE], now=clock), realm="r", service="s"
    )


def ask(access: TokenAccess, issuer: Issuer, **more: Any) -> Grant:
    """Requests one repository with a new token of the issuer; ``more``: its claims, its header."""
    return access.authorize(
        b"Bearer " + issuer.token(pulls("v2/a"), now=NOW, **more).encode(), ["v2/a"]
    )
