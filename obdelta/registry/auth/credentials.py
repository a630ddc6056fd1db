"""Whose credentials go to the upstream, as values that never show their secret."""

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
    """What an client shows to the upstream; make one by :meth:`anonymous`, :meth:`bearer` or
    :meth:`basic`.

    ``exchange`` says that these are the server's own (or nobody's) and may be exchanged for a token
    at the realm that the upstream names. Without it they are a device's: passed on as they are, and
    the upstream's challenge goes back to it. Equal credentials are equal and hash alike (caches are
    keyed by them); ``repr`` and ``str`` show no secret.
    """

    kind: Literal["anonymous", "bearer", "basic"]
    user: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    exchange: bool = False

    @classmethod
    def anonymous(cls, *, exchange: bool = False) -> Credentials:
        """Nobody's."""
        return cls("anonymous", exchange=exchange)

    @classmethod
    def bearer(cls, token: str) -> Credentials:
        """A token, sent as it is; ValueError if it cannot stand in a header."""
        if _TOKEN68.fullmatch(token.encode("utf-8")) is None:
            raise ValueError("a bearer token has characters that no token has")
        return cls("bearer", secret=token)

    @classmethod
    def basic(cls, user: str, password: str, *, exchange: bool = False) -> Credentials:
        """User and password; ValueError if they cannot stand in a header."""
        if ":" in user or _TEXT.fullmatch(user) is None or _TEXT.fullmatch(password) is None:
            raise ValueError(
                "a user name or password has characters that Basic authentication cannot carry"
            )
        return cls("basic", user, password, exchange)

    @classmethod
    def from_header(cls, authorization: bytes | None) -> Credentials:
        """A device's, from its ``Authorization`` header. What cannot be understood counts as none
        at all.
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
        """The ``Authorization`` value, None for the anonymous."""
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
    """Who may see this server's own password.

    ``realms``: the hosts, each with or without a port, of token servers that may; None: any.
    ``basic``: whether the registry itself may, where it asks for Basic authentication.
    """

    realms: frozenset[str] | None = None
    basic: bool = True

    def realm(self, host: str, netloc: str) -> bool:
        """Whether a token server may see it."""
        return self.realms is None or host.lower() in self.realms or netloc.lower() in self.realms


class CredentialPolicy(Protocol):
    """Turns an client's ``Authorization`` header into what is shown to the upstream (setting
    ``upstream-credentials``).
    """

    @property
    def passes_device_credentials(self) -> bool:
        """Whether the client's own header goes to the upstream: then the upstream's challenge must
        reach the client.
        """

    def credentials(self, authorization: bytes | None) -> Credentials:
        """For one request; never raises."""


@dataclass(frozen=True, slots=True)
class DeviceCredentials:
    """``device``: the client's own, passed on; this server holds no power of its own."""

    passes_device_credentials: bool = field(default=True, init=False)

    def credentials(self, authorization: bytes | None) -> Credentials:
        """The client's."""
        return Credentials.from_header(authorization)


@dataclass(frozen=True, slots=True)
class OwnCredentials:
    """``builder`` and ``none``: this server's own, whoever asks."""

    own: Credentials
    passes_device_credentials: bool = field(default=False, init=False)

    @classmethod
    def builder(cls, password: str) -> OwnCredentials:
        """openBalena's builder (``TOKEN_AUTH_BUILDER_TOKEN``), exchanged for a token a repository
        at the upstream's realm.
        """
        return cls(Credentials.basic("builder", password, exchange=True))

    @classmethod
    def none(cls) -> OwnCredentials:
        """Nobody's: an open registry, or one that gives tokens to the anonymous."""
        return cls(Credentials.anonymous(exchange=True))

    def credentials(self, authorization: bytes | None) -> Credentials:
        """The server's own."""
        return self.own
