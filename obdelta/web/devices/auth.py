"""Verifies tokens and decides which repositories a client may pull (``docs/access.md``).

Handlers call :meth:`Access.authorize` before any look-up, so cached answers are refused as new ones
are. Tokens are the JWTs that open-balena-api issues for its registry (distribution's "Token
Authentication Implementation").
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jwt import PyJWS
from jwt.exceptions import PyJWTError

from obdelta.errors import Denied, SettingsError, Unauthorized
from obdelta.oci.reference import is_repository
from obdelta.web.devices.token_keys import ALGORITHMS, Keys, load_keys

PULL = "pull"

MAX_TOKEN = 16 * 1024
"""Maximum size of a token in bytes; the largest of open-balena-api are a few kilobytes."""
LEEWAY = 60.0
"""Seconds by which the clocks of issuer and verifier may differ."""
LATEST = 1e11
"""Times from here on (the year 5138) are refused: they are no seconds since the epoch."""

_MAX_CACHED = 1024
_TOKEN = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of one client, from a verified token.

    ``subject`` is the token's ``sub`` (``d_<uuid>`` or a user). It is ``""`` if there is none;
    limits then count by address. ``actions`` maps exact repository names to granted actions; None
    grants everything (``auth = none``). ``aliases`` maps other names to the repositories that they
    stand for, as the token's issuer states. ``expires`` is in seconds since the epoch, None for
    never.
    """

    subject: str = ""
    actions: Mapping[str, frozenset[str]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    expires: float | None = None

    def allows(self, repository: str, action: str = PULL) -> bool:
        """Returns whether the action is granted on exactly this repository. Aliases are not
        resolved.
        """
        return self.actions is None or action in self.actions.get(repository, ())

    def repository(self, name: str) -> str:
        """Returns the repository that a name stands for: the alias's target if the name itself is
        not granted, else the name.
        """
        return name if self.allows(name) else self.aliases.get(name, name)


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


class TokenInvalid(Exception):
    """A refused token. The message contains no part of it."""


class TokenExpired(TokenInvalid):
    """A token that is valid except for its expiry. ``grant`` holds its rights."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        super().__init__("the token has expired")


class Expired(Unauthorized):
    """A token refused only because it expired: signature, issuer, audience and shape are valid.
    ``token`` is its hash.
    """

    def __init__(self, why: str, challenge: str, grant: Grant, token: str) -> None:
        self.grant, self.token = grant, token
        super().__init__(why, challenge)


class Verifier:
    """Verifies tokens and returns their grants.

    ``issuer`` and one of ``audiences`` must match the token's. ``now`` returns seconds since the
    epoch. Verified tokens are cached by hash until they expire or the keys change, as a pull sends
    dozens of requests with one token.
    """

    def __init__(
        self, keys: Keys, *, issuer: str, audiences: Collection[str], now: Callable[[], float]
    ) -> None:
        self._keys, self._issuer, self._audiences, self._now = (
            keys,
            issuer,
            frozenset(audiences),
            now,
        )
        self._jws = PyJWS(algorithms=sorted(ALGORITHMS))
        self._cache: OrderedDict[bytes, Grant] = OrderedDict()
        self._generation = keys.generation

    def verify(self, token: bytes) -> Grant:
        """Returns the token's grant. Raises TokenInvalid, or TokenExpired if only its
        time is over.
        """
        if len(token) > MAX_TOKEN:
            raise TokenInvalid("the token is too long")
        self._keys.refresh()
        if self._generation != self._keys.generation:
            self._generation = self._keys.generation
            self._cache.clear()
        name = hashlib.sha256(token).digest()
        grant = self._cache.pop(name, None)
        if grant is None:
            grant = self._grant(self._claims(token))
        elif self._now() >= _expiry(grant):
            raise TokenExpired(grant)
        self._cache[name] = grant
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return grant

    def reload(self) -> None:
        """Reads the keys again."""
        self._keys.reload()

    def _claims(self, token: bytes) -> dict[str, Any]:
        """Returns the claims of a token after verifying its signature. Raises TokenInvalid."""
        if _TOKEN.fullmatch(token) is None:
            raise TokenInvalid("the token is malformed")
        try:
            header = self._jws.get_unverified_header(token)
        except PyJWTError:
            raise TokenInvalid("the token is malformed") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or "b64" in header:
            raise TokenInvalid("the token is malformed")
        keys = self._keys.select(algorithm, kid)
        if not keys:
            raise TokenInvalid("no key here verifies the token's algorithm and key id")
        payload = next(
            filter(None, (self._payload(token, algorithm, key.key) for key in keys)), None
        )
        if payload is None:
            raise TokenInvalid("the token's signature is wrong")
        try:
            claims = json.loads(payload)
        except (ValueError, RecursionError):
            raise TokenInvalid("the token is malformed") from None
        if not isinstance(claims, dict):
            raise TokenInvalid("the token is malformed")
        return claims

    def _payload(self, token: bytes, algorithm: str, key: Any) -> bytes | None:
        """Returns the signed payload, or None if this key did not sign it."""
        try:
            # Keys.select chose the algorithm by the key's type and the settings, never by the
            # token alone.
            payload: bytes = self._jws.decode(token, key, algorithms=[algorithm])
        except PyJWTError:
            return None
        return payload

    def _grant(self, claims: dict[str, Any]) -> Grant:
        now = self._now()
        expires, begins = _time(claims, "exp"), _time(claims, "nbf")
        if expires is None:
            raise TokenInvalid("the token has no expiry")
        if claims.get("iss") != self._issuer:
            raise TokenInvalid("the token is from another issuer")
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not any(isinstance(one, str) and one in self._audiences for one in audiences):
            raise TokenInvalid("the token is for another audience")
        if begins is not None and begins - LEEWAY > now:
            raise TokenInvalid("the token is not valid yet")
        actions, aliases = _access(claims.get("access"))
        subject = claims.get("sub")
        grant = Grant("" if subject is None else _text(subject, "sub"), actions, aliases, expires)
        if now >= _expiry(grant):
            raise TokenExpired(grant)
        return grant


def _expiry(grant: Grant) -> float:
    return math.inf if grant.expires is None else grant.expires + LEEWAY


def _time(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenInvalid(f"the token's {name} is not a time")
    try:
        seconds = float(value)
    except OverflowError:
        raise TokenInvalid(f"the token's {name} is not a time") from None
    # Python's JSON takes NaN, which is neither before nor after anything.
    if not -LATEST < seconds < LATEST:
        raise TokenInvalid(f"the token's {name} is not a time")
    return seconds


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TokenInvalid(f"the token's {name} is not text")
    return value


def _access(claim: object) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Returns actions by repository, and aliases, of the ``access`` claim. Raises TokenInvalid
    unless it has the specified shape.

    Entries of types other than ``repository`` grant nothing here. Several entries for one
    repository add up. An alias that entries give to different repositories is dropped.
    """
    if claim is None:
        return {}, {}
    if not isinstance(claim, list):
        raise TokenInvalid("the token's access is not a list")
    actions: dict[str, frozenset[str]] = {}
    aliases: dict[str, set[str]] = {}
    for entry in claim:
        if not isinstance(entry, dict):
            raise TokenInvalid("the token's access holds something else than objects")
        kind, name = (
            _text(entry.get("type"), "access type"),
            _text(entry.get("name"), "access name"),
        )
        granted = entry.get("actions")
        if granted is None:
            granted = []
        if not isinstance(granted, list):
            raise TokenInvalid("the token's access actions are not a list")
        granted = frozenset(_text(action, "access action") for action in granted)
        if kind != "repository" or not granted:
            continue
        actions[name] = actions.get(name, frozenset()) | granted
        alias = entry.get("alias")
        if alias is not None:
            aliases.setdefault(_text(alias, "access alias"), set()).add(name)
    return actions, {alias: names.pop() for alias, names in aliases.items() if len(names) == 1}


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
                raise Denied(f"the token does not allow {PULL} on {_shown(name)}")
        return grant

    def reload(self) -> None:
        """Reads the keys again, even if their file has not changed."""
        self._verifier.reload()

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
    if key is None:
        raise SettingsError(
            "auth-key",
            None,
            "the API's public key: a file, as /certs/private/api.<domain>.pem of openBalena is"
            " (BALENA_TLD leads there), or TOKEN_AUTH_CERT_PUB; only a server that everybody may"
            " pull everything from does without, with auth = none",
        )
    for name, value in (
        ("issuer", issuer),
        ("audience", audiences),
        ("realm", realm),
        ("service", service),
    ):
        if not value:
            raise SettingsError(
                f"auth-{name}", None, "a value, or BALENA_TLD in the environment, which leads to it"
            )
    assert issuer and audiences and realm and service  # noqa: S101 - for the type checker, see above
    verifier = Verifier(
        load_keys(key, algorithms, now), issuer=issuer, audiences=audiences, now=now
    )
    return TokenAccess(verifier, realm=realm, service=service)


def token_hash(authorization: bytes) -> str:
    """Returns the hash of a header's token, which names the token without revealing it."""
    return hashlib.sha256(authorization.strip(b" \t").partition(b" ")[2].strip(b" \t")).hexdigest()


def _shown(name: str) -> str:
    return name if is_repository(name) else "what is asked for"
