"""An issuer of registry tokens: keys and files as openBalena's cert-manager writes them, tokens as
open-balena-api signs them.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from jwt import PyJWS
from jwt.algorithms import get_default_algorithms

ISSUER = "api.example.com"
AUDIENCE = "registry2.example.com"
LIFETIME = 4 * 3600
_NODE_SCRIPT = Path(__file__).parent.parent / "node" / "token.js"

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def make_key(algorithm: str) -> PrivateKey:
    """Returns a new private key for a JWT algorithm."""
    if algorithm.startswith(("RS", "PS")):
        return rsa.generate_private_key(65537, 2048)
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(
        {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
    )


def key_id(key: PrivateKey) -> str:
    """Returns libtrust's key ID, as cert-manager computes it: 30 bytes of sha256 over the DER
    public key, base32 in groups of four.
    """
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    text = base64.b32encode(hashlib.sha256(der).digest()[:30]).decode()
    return ":".join(text[i : i + 4] for i in range(0, len(text), 4))


def make_certificate(
    key: PrivateKey,
    *names: str,
    signer: tuple[x509.Certificate, PrivateKey] | None = None,
    days: int = 30,
) -> bytes:
    """Returns a PEM certificate for DNS names, self-signed unless there is a signer."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .sign(
            signer[1] if signer else key,
            None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256(),
        )
    )
    return made.public_bytes(Encoding.PEM)


def private_pem(key: PrivateKey) -> bytes:
    """Returns the key as PKCS#8 without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PrivateKey) -> bytes:
    """Returns the key as SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pulls(*repositories: str) -> list[dict[str, Any]]:
    """Returns the ``access`` claim that allows to pull each repository."""
    return [{"type": "repository", "name": name, "actions": ["pull"]} for name in repositories]


class Issuer:
    """One signing key with its public forms."""

    def __init__(
        self, algorithm: str = "ES256", *, issuer: str = ISSUER, audience: str = AUDIENCE
    ) -> None:
        self.algorithm, self.issuer, self.audience = algorithm, issuer, audience
        self.key = make_key(algorithm)
        self.kid = key_id(self.key)
        self.certificate = make_certificate(self.key, issuer)
        self.public = public_pem(self.key)

    def jwk(self, **more: Any) -> dict[str, Any]:
        """Returns the public key as a JSON Web Key, with ``use``, ``alg`` and ``kid`` as
        cert-manager writes them.
        """
        algorithm: Any = get_default_algorithms()[self.algorithm]
        plain = json.loads(algorithm.to_jwk(self.key.public_key()))
        plain.pop("key_ops", None)
        return {**plain, "use": "sig", "alg": self.algorithm, "kid": self.kid, **more}

    def jwks(self, *others: Issuer) -> bytes:
        """Returns a key set of this issuer and others."""
        return json.dumps({"keys": [one.jwk() for one in (self, *others)]}, indent=2).encode()

    def write(self, directory: Path) -> Path:
        """Writes ``api.<tld>.pem``, ``.key``, ``.kid`` and ``.jwks.json``; returns the
        certificate's path.
        """
        base = directory / self.issuer
        (directory / f"{self.issuer}.key").write_bytes(private_pem(self.key))
        (directory / f"{self.issuer}.kid").write_text(self.kid)
        (directory / f"{self.issuer}.jwks.json").write_bytes(self.jwks())
        certificate = base.with_name(base.name + ".pem")
        certificate.write_bytes(self.certificate)
        return certificate

    def claims(
        self,
        access: Any,
        *,
        now: float | None = None,
        subject: Any = "d_0123456789abcdef",
        **more: Any,
    ) -> dict[str, Any]:
        """Returns the claims of open-balena-api's tokens; ``more`` overrides, and a value of
        ``...`` removes.
        """
        at = int(time.time() if now is None else now)
        claims = {
            "jti": str(uuid.uuid4()),
            "iat": at,
            "nbf": at - 10,
            "access": access,
            "exp": at + LIFETIME,
            "aud": self.audience,
            "iss": self.issuer,
            "sub": subject,
            **more,
        }
        return {name: value for name, value in claims.items() if value is not ...}

    def token(self, access: Any, *, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """Returns a signed token with an ``access`` claim (see :func:`pulls`)."""
        return self.sign(json.dumps(self.claims(access, **claims)).encode(), header)

    def sign(
        self, payload: bytes, header: Mapping[str, Any] | None = None, *, key: Any = None
    ) -> str:
        """Signs any payload; ``header`` is merged over ``alg`` and ``kid``."""
        headers = {"kid": self.kid, **(header or {})}
        return PyJWS().encode(
            payload, self.key if key is None else key, headers.get("alg", self.algorithm), headers
        )

    def node_job(
        self, access: Iterable[Any], *, now: float | None = None, **more: Any
    ) -> dict[str, Any]:
        """Returns a job for :func:`node_tokens`."""
        return {
            "key": private_pem(self.key).decode(),
            "algorithm": self.algorithm,
            "kid": self.kid,
            "issuer": self.issuer,
            "audience": self.audience,
            "subject": "d_0123456789abcdef",
            "access": list(access),
            "now": int(time.time() if now is None else now),
            "expiresIn": LIFETIME,
            **more,
        }


def node_tokens(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns tokens signed by npm's jsonwebtoken, called as open-balena-api calls it."""
    done = subprocess.run(
        ["node", str(_NODE_SCRIPT)],
        input=json.dumps(jobs).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    tokens: list[str] = json.loads(done.stdout)
    return tokens
