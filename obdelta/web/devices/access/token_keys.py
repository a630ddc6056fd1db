"""Loads and reloads the public keys that verify tokens, in the formats that openBalena uses.

These are a PEM certificate or public key (``/certs/private/api.<TLD>.pem``), a JSON Web Key Set
(RFC 7517; ``/certs/private/api.<TLD>.jwks.json``), or base64 of either (``TOKEN_AUTH_CERT_PUB``).
Only asymmetric keys are accepted. A verifier must not be able to sign, and a public key can never
become the secret of an HMAC.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificates
from jwt import PyJWK
from jwt.exceptions import PyJWTError
from twisted.logger import Logger

from obdelta.concurrency.watched_file import FileProblem, WatchedFiles
from obdelta.errors import SettingsError

PublicKey = (
    ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
)

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
ALGORITHMS = frozenset((*_RSA, *_CURVES.values(), "EdDSA"))
"""The algorithms of keys that cannot sign (RFC 7518, RFC 8037)."""

_MIN_RSA_BITS = 2048
_MAX_FILE = 1 << 20
_MAX_KEYS = 32
_PRIVATE = re.compile(rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")


class KeyUnusable(ValueError):
    """A text that holds no key for verifying tokens. The message never quotes the text."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key, the algorithms that it may verify, and the ``kid`` that tokens name it by
    (None: any).
    """

    key: PublicKey
    algorithms: frozenset[str]
    kid: str | None = None


def fitting_algorithms(key: object) -> frozenset[str]:
    """Returns the algorithms of a key's type. Raises KeyUnusable for unsafe or unknown types and
    sizes.
    """
    if isinstance(key, ec.EllipticCurvePublicKey):
        algorithm = _CURVES.get(key.curve.name)
        if algorithm is None:
            raise KeyUnusable(f"the elliptic curve {key.curve.name} is not supported")
        return frozenset((algorithm,))
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise KeyUnusable(
                f"an RSA key of {key.key_size} bits is too short: use {_MIN_RSA_BITS} or more"
            )
        return frozenset(_RSA)
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return frozenset(("EdDSA",))
    raise KeyUnusable("it holds a key of another type than EC, RSA, Ed25519 or Ed448")


def parse_keys(content: bytes, allowed: Iterable[str]) -> tuple[VerificationKey, ...]:
    """Returns the keys in a PEM file or key set that fit an ``allowed`` algorithm. Raises
    KeyUnusable if there is none.

    Only the first certificate of a chain counts: a CA signs certificates, not tokens. A certificate
    is only a container for its key. Its dates and names are ignored, as the issuer's own registry
    ignores them.
    """
    found = _key_set(content) if content.lstrip()[:1] == b"{" else [(None, _pem_key(content), None)]
    wanted = frozenset(allowed)
    keys = []
    for kid, key, algorithm in found:
        fits = fitting_algorithms(key) & wanted & (frozenset((algorithm,)) if algorithm else wanted)
        if fits:
            keys.append(VerificationKey(key, fits, kid))
    if not keys:
        raise KeyUnusable(
            f"no key in it is of the type for {' or '.join(sorted(wanted))} (setting jwt-algorithm)"
        )
    return tuple(keys)


def _pem_key(content: bytes) -> PublicKey:
    if _PRIVATE.search(content):
        raise KeyUnusable(
            "it holds a private key; give the public key or the certificate, nothing here may sign"
            " tokens"
        )
    key: Any
    try:
        if b"-----BEGIN CERTIFICATE-----" in content:
            key = load_pem_x509_certificates(content)[0].public_key()
        elif content.count(b"-----BEGIN") > 1:
            raise KeyUnusable("it holds several public keys: put them into a JSON Web Key Set")
        else:
            key = load_pem_public_key(content)
    except KeyUnusable:
        raise
    except Exception as error:  # cryptography raises several families of parse errors
        raise KeyUnusable(
            "it holds neither a PEM certificate, nor a PEM public key, nor a JSON Web Key Set"
        ) from error
    fitting_algorithms(key)
    return key  # type: ignore[no-any-return]


def _key_set(content: bytes) -> list[tuple[str | None, PublicKey, str | None]]:
    """Returns ``(kid, key, alg)`` of each signature key in a JSON Web Key Set; skips other kinds of
    key.
    """
    try:
        entries = json.loads(content)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeyUnusable("it looks like JSON and is not a JSON Web Key Set") from error
    if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
        raise KeyUnusable(f"its member keys is not a list of at most {_MAX_KEYS}")
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise KeyUnusable("its member keys holds something else than objects")
        if entry.get("kty") not in ("EC", "RSA", "OKP") or entry.get("use", "sig") != "sig":
            continue
        if "d" in entry:
            raise KeyUnusable("it holds a private key; nothing here may sign tokens")
        kid, algorithm = entry.get("kid"), entry.get("alg")
        if not isinstance(kid, str | None) or not isinstance(algorithm, str | None):
            raise KeyUnusable("a key's kid or alg is not a string")
        if algorithm is not None and algorithm not in ALGORITHMS:
            continue
        try:
            key = PyJWK(entry, algorithm).key
        except (PyJWTError, ValueError, TypeError, KeyError, AttributeError):
            # from None: PyJWT's message quotes the whole entry.
            raise KeyUnusable("one of its keys cannot be read") from None
        fitting_algorithms(key)
        found.append((kid.strip() if kid is not None else None, key, algorithm))
    return found


class Keys:
    """The keys in force: :attr:`current`, and :attr:`generation`, which increases with every
    change.
    """

    current: tuple[VerificationKey, ...]
    generation = 0

    def refresh(self) -> None:
        """Loads newer keys if there are any. Cheap enough for every request."""

    def reload(self) -> list[str]:
        """Reads the keys again and logs the result. Returns why that failed: one line, or none."""
        return []

    def problem(self) -> FileProblem | None:
        """Loads newer keys if there are any. Returns why they cannot be used, None if they can."""
        return None

    def select(self, algorithm: str, kid: str | None) -> tuple[VerificationKey, ...]:
        """Returns the keys that may verify a token with this header.

        Among several keys the ``kid`` chooses; keys without one fit any. A single key needs no
        name, because the signature alone decides.
        """
        if len(self.current) == 1:
            candidates: Sequence[VerificationKey] = self.current
        else:
            wanted = kid.strip() if kid is not None else None
            candidates = [key for key in self.current if key.kid is None or key.kid == wanted]
        return tuple(key for key in candidates if algorithm in key.algorithms)


class FixedKeys(Keys):
    """Keys that never change."""

    def __init__(self, keys: Sequence[VerificationKey]) -> None:
        self.current = tuple(keys)


class KeyFile(Keys):
    """Keys in a file, read again when it changes.

    The file is checked at most once a second (``now`` is in seconds). While it is unreadable or
    unusable, the last keys stay in force, and the reason is logged once a change. The constructor
    raises :class:`SettingsError`, so a server without a key does not start.
    """

    _log = Logger()

    def __init__(self, path: Path, algorithms: Iterable[str], now: Callable[[], float]) -> None:
        self._path, self._algorithms, self._now = path, frozenset(algorithms), now
        self._problem: FileProblem | None = None
        self._watched = WatchedFiles([path], now)
        try:
            self.current = self._read()
        except (OSError, KeyUnusable) as error:
            raise SettingsError(
                "auth-key", str(path), f"a file with the public key of tokens: {_why(error)}"
            ) from error

    def refresh(self) -> None:
        """Implements :meth:`Keys.refresh`."""
        if self._watched.changed():
            self._load()

    def reload(self) -> list[str]:
        """Implements :meth:`Keys.reload`."""
        self._watched.mark()
        return self._load()

    def problem(self) -> FileProblem | None:
        """Implements :meth:`Keys.problem`."""
        self.refresh()
        return self._problem

    def _load(self) -> list[str]:
        try:
            self.current = self._read()
        except (OSError, KeyUnusable) as error:
            self._log.error(
                "key file {path} cannot be used, the old key stays in force: {why}",
                path=str(self._path),
                why=_why(error),
            )
            since = self._now() if self._problem is None else self._problem.since
            self._problem = FileProblem(self._path, _why(error), since, "auth-key")
            return [f"{self._path}: {_why(error)}: the old key stays in force"]
        self.generation += 1
        self._problem = None
        self._log.info("key file {path} was read again", path=str(self._path))
        return []

    def _read(self) -> tuple[VerificationKey, ...]:
        with self._path.open("rb") as source:
            content = source.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise KeyUnusable(f"it is larger than {_MAX_FILE} bytes")
        return parse_keys(content, self._algorithms)


def _why(error: OSError | KeyUnusable) -> str:
    return (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)


def load_keys(source: Path | bytes, algorithms: Iterable[str], now: Callable[[], float]) -> Keys:
    """Returns the keys of the setting ``auth-key``: a file, or the text itself. Raises
    SettingsError.
    """
    if isinstance(source, Path):
        return KeyFile(source, algorithms, now)
    try:
        return FixedKeys(parse_keys(source, algorithms))
    except KeyUnusable as error:
        raise SettingsError(
            "auth-key", "(base64)", f"base64 of the public key of tokens: {error}"
        ) from error
