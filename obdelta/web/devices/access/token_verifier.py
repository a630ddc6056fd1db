"""Verifies tokens: signature, issuer, audience, times, and the shape of what they grant.

Tokens are the JWTs that open-balena-api issues for its registry (distribution's "Token
Authentication Implementation").
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from jwt import PyJWS
from jwt.exceptions import PyJWTError

from obdelta.concurrency.expiring_map import LruMap
from obdelta.concurrency.watched_file import FileProblem
from obdelta.web.devices.access.token_keys import ALGORITHMS, Keys

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


class TokenInvalid(Exception):
    """A refused token. The message contains no part of it."""


class TokenExpired(TokenInvalid):
    """A token that is valid except for its expiry. ``grant`` holds its rights."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        super().__init__("the token has expired")


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
        self._cache: LruMap[bytes, Grant] = LruMap(_MAX_CACHED)
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
        grant = self._cache.get(name)
        if grant is None:
            grant = self._grant(self._claims(token))
        elif self._now() >= _expiry(grant):
            self._cache.pop(name)
            raise TokenExpired(grant)
        self._cache.set(name, grant)
        return grant

    def reload(self) -> list[str]:
        """Reads the keys again. Returns why that failed."""
        return self._keys.reload()

    def key_problem(self) -> FileProblem | None:
        """Returns why the file of the keys cannot be used, None if it can."""
        return self._keys.problem()

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
            raise TokenInvalid("no configured key fits the token's algorithm and key id")
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
        for check in self._checks().values():
            check(claims)
        actions, aliases = _access(claims.get("access"))
        grant = Grant(_subject(claims), actions, aliases, _time(claims, "exp"))
        if self._now() >= _expiry(grant):
            raise TokenExpired(grant)
        return grant

    def _checks(self) -> Mapping[str, Callable[[dict[str, Any]], object]]:
        """Returns the check of each claim; the time of ``exp`` comes last. They raise
        TokenInvalid.
        """
        return {
            "exp": _needed_expiry,
            "iss": self._check_issuer,
            "aud": self._check_audience,
            "nbf": self._check_begin,
            "access": lambda claims: _access(claims.get("access")),
            "sub": _subject,
        }

    def _check_issuer(self, claims: dict[str, Any]) -> None:
        if claims.get("iss") != self._issuer:
            raise TokenInvalid("the token is from another issuer")

    def _check_audience(self, claims: dict[str, Any]) -> None:
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not any(isinstance(one, str) and one in self._audiences for one in audiences):
            raise TokenInvalid("the token is for another audience")

    def _check_begin(self, claims: dict[str, Any]) -> None:
        begins = _time(claims, "nbf")
        if begins is not None and begins - LEEWAY > self._now():
            raise TokenInvalid("the token is not valid yet")

    def examine(self, token: bytes) -> ExaminedToken:
        """Returns every reason to refuse a token, not only the first, for operators."""
        problems: dict[str, str] = {}
        self._keys.refresh()
        try:
            claims = self._claims(token)
        except TokenInvalid as error:
            problems["signature"] = str(error)
            claims = unverified_claims(token)
        for name, check in self._checks().items():
            try:
                check(claims)
            except TokenInvalid as error:
                problems[name] = str(error)
        if "exp" not in problems and self._now() >= (_time(claims, "exp") or 0.0) + LEEWAY:
            problems["exp"] = "the token has expired"
        expected = {"iss": self._issuer, "aud": " or ".join(sorted(self._audiences))}
        for name, value in expected.items():
            if name in problems:
                problems[name] += f": expected {value}"
        return ExaminedToken(claims, problems)


@dataclass(frozen=True, slots=True)
class ExaminedToken:
    """The claims of a token, and why each refused one is refused. ``signature`` counts as a claim;
    without a valid one the claims may be forged.
    """

    claims: Mapping[str, Any]
    problems: Mapping[str, str]


def unverified_claims(token: bytes) -> dict[str, Any]:
    """Returns the claims that a token states, without a check of its signature; none if it cannot
    be read. Never decide on access by them.
    """
    part = token.split(b".")[1:2] or [b""]
    try:
        claims = json.loads(base64.urlsafe_b64decode(part[0] + b"=" * (-len(part[0]) % 4)))
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def repositories(claims: Mapping[str, Any]) -> list[str]:
    """Returns the repositories that claims allow to pull. Raises TokenInvalid."""
    actions, _ = _access(claims.get("access"))
    return sorted(name for name, granted in actions.items() if PULL in granted)


def _needed_expiry(claims: dict[str, Any]) -> None:
    if _time(claims, "exp") is None:
        raise TokenInvalid("the token has no expiry")


def _subject(claims: dict[str, Any]) -> str:
    subject = claims.get("sub")
    return "" if subject is None else _text(subject, "sub")


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
