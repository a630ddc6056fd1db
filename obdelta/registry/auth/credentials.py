"""Credentials for the upstream, and the policies that choose the device's or the server's own
(setting ``upstream-credentials``).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Literal, Protocol, assert_never

_TOKEN68 = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials for the upstream; create them with :meth:`anonymous`, :meth:`bearer` or
    :meth:`basic`.

    ``exchange`` means that these are the server's own (or anonymous) and may be exchanged for a
    token at the realm that the upstream names. Without it they are a device's: passed on unchanged,
    and the device gets the upstream's challenge. Equal credentials hash alike (caches are keyed by
    them); ``repr`` and ``str`` show no secret.
    """

    kind: Literal["anonymous", "bearer", "basic"]
    user: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    exchange: bool = False

    @classmethod
    def anonymous(cls, *, exchange: bool = False) -> Credentials:
        """Returns anonymous credentials."""
        return cls("anonymous", exchange=exchange)

    @classmethod
    def bearer(cls, token: str) -> Credentials:
        """Returns a token that is sent as it is. Raises ValueError if a header cannot carry it."""
        if _TOKEN68.fullmatch(token.encode("utf-8")) is None:
            raise ValueError("a bearer token has characters that no token has")
        return cls("bearer", secret=token)

    @classmethod
    def basic(cls, user: str, password: str, *, exchange: bool = False) -> Credentials:
        """Returns user and password. Raises ValueError if a header cannot carry them."""
        if ":" in user or _TEXT.fullmatch(user) is None or _TEXT.fullmatch(password) is None:
            raise ValueError(
                "a user name or password has characters that Basic authentication cannot carry"
            )
        return cls("basic", user, password, exchange)

    @classmethod
    def from_header(cls, authorization: bytes | None) -> Credentials:
        """Returns a device's credentials from its ``Authorization`` header. A header that cannot be
        parsed counts as anonymous.
        """
        scheme, _, rest = (authorization or b"").strip().partition(b" ")
        rest = rest.strip()
        try:
            if scheme.lower() == b"bearer":
                return cls.bearer(rest.decode("ascii"))
            if scheme.lower() == b"basic":
                user, colon, password = (
                    base64.b64decode(rest, validate=True).decode("utf-8").partition(":")
                )
                if colon:
                    return cls.basic(user, password)
        except (ValueError, binascii.Error):
            pass
        return cls.anonymous()

    def header(self) -> bytes | None:
        """Returns the ``Authorization`` value, None for anonymous credentials."""
        match self.kind:
            case "anonymous":
                return None
            case "bearer":
                return b"Bearer " + self.secret.encode("ascii")
            case "basic":
                return b"Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode())
            case _:
                assert_never(self.kind)


@dataclass(frozen=True, slots=True)
class Disclosure:
    """The hosts that may see this server's own password.

    ``realms``: hosts of token servers, each with or without a port; None: any. ``basic``: whether
    the registry itself may, if it requires Basic authentication.
    """

    realms: frozenset[str] | None = None
    basic: bool = True

    def realm(self, host: str, netloc: str) -> bool:
        """Returns whether a token server may see the password."""
        return self.realms is None or host.lower() in self.realms or netloc.lower() in self.realms


class CredentialPolicy(Protocol):
    """Turns a client's ``Authorization`` header into credentials for the upstream (setting
    ``upstream-credentials``).
    """

    def credentials(self, authorization: bytes | None) -> Credentials:
        """Returns the credentials for one request; never raises."""


@dataclass(frozen=True, slots=True)
class DeviceCredentials:
    """``device``: the client's own credentials are passed on; this server has none."""

    def credentials(self, authorization: bytes | None) -> Credentials:
        """Returns the client's credentials."""
        return Credentials.from_header(authorization)


@dataclass(frozen=True, slots=True)
class OwnCredentials:
    """``builder`` and ``none``: this server's own credentials, for every client."""

    own: Credentials

    @classmethod
    def builder(cls, password: str) -> OwnCredentials:
        """Returns those of openBalena's builder (``TOKEN_AUTH_BUILDER_TOKEN``), exchanged for one
        token per repository at the upstream's realm.
        """
        return cls(Credentials.basic("builder", password, exchange=True))

    @classmethod
    def none(cls) -> OwnCredentials:
        """Returns anonymous ones: for an open registry, or one that gives tokens to anonymous
        clients.
        """
        return cls(Credentials.anonymous(exchange=True))

    def credentials(self, authorization: bytes | None) -> Credentials:
        """Returns the server's credentials."""
        return self.own
