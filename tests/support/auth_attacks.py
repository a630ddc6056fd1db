"""Tokens that are refused, each with its status, and tokens that are accepted."""

from __future__ import annotations

import base64
import hmac
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from obdelta.errors import Denied, ObdeltaError, Unauthorized
from obdelta.web.devices.access.admission import TokenAccess
from obdelta.web.devices.access.token_keys import FixedKeys, parse_keys
from obdelta.web.devices.access.token_verifier import LEEWAY, MAX_TOKEN, Verifier
from obdelta.web.errors import status_of
from tests.support.tokens import AUDIENCE, ISSUER, Issuer, pulls

NOW = float(int(time.time()))
REALM = "https://api.example.com/auth/v1/token"
BASE, TARGET = "v2/" + "a" * 32, "v2/" + "b" * 32
BOTH = pulls(BASE, TARGET)
OURS = Issuer()
SIBLING = Issuer()  # another P-256 key, not configured
RSA = Issuer("RS256")
EDDSA = Issuer("EdDSA")
P384 = Issuer("ES384")


def access_for(*issuers: Issuer, now: Callable[[], float] = lambda: NOW) -> TokenAccess:
    keys = parse_keys(issuers[0].jwks(*issuers[1:]), {issuer.algorithm for issuer in issuers})
    verifier = Verifier(FixedKeys(keys), issuer=ISSUER, audiences=[AUDIENCE], now=now)
    return TokenAccess(verifier, realm=REALM, service=AUDIENCE)


ACCESS = access_for(OURS)


def status(
    header: bytes | None, needs: Sequence[str] = (BASE, TARGET), *, access: TokenAccess = ACCESS
) -> int:
    """Returns the HTTP status for a request with this header; errors must not quote the header."""
    try:
        access.authorize(header, needs)
    except ObdeltaError as error:
        shown = f"{error} {getattr(error, 'challenge', '')}"
        for part in re.findall(rb"[A-Za-z0-9_-]{20,}", header or b""):
            assert part.decode() not in shown
        assert isinstance(error, Unauthorized | Denied)
        assert "\n" not in shown and len(shown) < 1000
        return status_of(error)
    return 200


def bearer(token: str | bytes) -> bytes:
    return b"Bearer " + (token if isinstance(token, bytes) else token.encode())


def b64(raw: bytes | str) -> str:
    return (
        base64.urlsafe_b64encode(raw.encode() if isinstance(raw, str) else raw)
        .rstrip(b"=")
        .decode()
    )


def good(access: Any = BOTH, **more: Any) -> str:
    return OURS.token(access, now=NOW, **more)


def parts(token: str) -> list[str]:
    return token.split(".")


def with_header(header: Any, token: str | None = None) -> str:
    """Returns a token with a header of the attacker, and an honest payload and signature."""
    _, payload, signature = parts(token or good())
    return ".".join(
        [b64(header if isinstance(header, str) else json.dumps(header)), payload, signature]
    )


def raw(payload: bytes | str) -> str:
    """Returns any payload with a valid signature."""
    return OURS.sign(payload if isinstance(payload, bytes) else payload.encode())


def symmetric(secret: bytes, algorithm: str = "HS256") -> str:
    """Returns an HMAC token whose secret is public knowledge (PyJWT itself would refuse to make
    it).
    """
    head = b64(json.dumps({"alg": algorithm, "typ": "JWT", "kid": OURS.kid}))
    body = b64(json.dumps(OURS.claims(BOTH, now=NOW)))
    digest = hmac.digest(
        secret, f"{head}.{body}".encode(), "sha256" if algorithm == "HS256" else "sha512"
    )
    return f"{head}.{body}.{b64(digest)}"


def der_signature() -> str:
    head, payload, signature = parts(good())
    r_s = base64.urlsafe_b64decode(signature + "==")
    der = encode_dss_signature(int.from_bytes(r_s[:32], "big"), int.from_bytes(r_s[32:], "big"))
    return f"{head}.{payload}.{b64(der)}"


def flipped(token: str, part: int) -> str:
    """Changes one character in the middle of a part."""
    pieces = parts(token)
    at = len(pieces[part]) // 2
    pieces[part] = (
        pieces[part][:at] + ("A" if pieces[part][at] != "A" else "B") + pieces[part][at + 1 :]
    )
    return ".".join(pieces)


def loose_bits() -> str:
    """Returns the same signature bytes in another spelling: base64 of 64 bytes leaves 4 bits
    unused.
    """
    token = good()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) + 1]


def entry(**more: Any) -> dict[str, Any]:
    return {"type": "repository", "name": TARGET, "actions": ["pull"], **more}


ATTACKS: dict[str, tuple[bytes | None, int]] = {
    # no token, or something else
    "no header": (None, 401),
    "empty header": (b"", 401),
    "blank header": (b"  ", 401),
    "scheme alone": (b"Bearer", 401),
    "scheme and blanks": (b"Bearer    ", 401),
    "another scheme": (b"Basic YnVpbGRlcjp0b2tlbg==", 401),
    "a scheme that only begins like it": (b"Bearerx " + good().encode(), 401),
    "token without scheme": (good().encode(), 401),
    "garbage": (bearer("not a token at all"), 401),
    "bytes": (bearer(bytes(range(128, 256))), 401),
    "NUL in it": (bearer(good().encode() + b"\0"), 401),
    "a line feed behind it": (bearer(good().encode() + b"\n"), 401),
    "a blank inside": (bearer(good().replace(".", ". ", 1)), 401),
    "two tokens": (bearer(good() + "," + good()), 401),
    "one part": (bearer(parts(good())[0]), 401),
    "two parts": (bearer(".".join(parts(good())[:2])), 401),
    "four parts": (bearer(good() + ".AAAA"), 401),
    "no signature": (bearer(".".join(parts(good())[:2]) + "."), 401),
    "no payload": (bearer("{0}..{2}".format(*parts(good()))), 401),
    "padding": (bearer(good() + "=="), 401),
    "the plain base64 alphabet": (bearer(good()[:-4] + "+/+/"), 401),
    "loose bits in the signature": (bearer(loose_bits()), 401),
    "over the size": (bearer(good(pad="x" * MAX_TOKEN)), 401),
    "a megabyte": (bearer("A" * (1 << 20)), 401),
    # the algorithm
    "alg none": (bearer(with_header({"alg": "none"}).rpartition(".")[0] + "."), 401),
    "alg none over a right signature": (bearer(with_header({"alg": "none", "typ": "JWT"})), 401),
    "alg nOnE": (bearer(with_header({"alg": "nOnE", "typ": "JWT"})), 401),
    "alg missing": (bearer(with_header({"typ": "JWT"})), 401),
    "alg null": (bearer(with_header({"alg": None})), 401),
    "alg a list": (bearer(with_header({"alg": ["ES256"]})), 401),
    "alg twice": (bearer(with_header('{"alg":"ES256","alg":"none"}')), 401),
    "alg in lower case": (bearer(with_header({"alg": "es256", "kid": OURS.kid})), 401),
    "HMAC with the public key": (bearer(symmetric(OURS.public)), 401),
    "HMAC with the certificate": (bearer(symmetric(OURS.certificate)), 401),
    "HMAC with the key's DER": (
        bearer(
            symmetric(
                OURS.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            )
        ),
        401,
    ),
    "HMAC with nothing": (bearer(symmetric(b"")), 401),
    "HMAC of another length": (bearer(symmetric(OURS.public, "HS512")), 401),
    "alg swapped to RS256": (bearer(with_header({"alg": "RS256", "kid": OURS.kid})), 401),
    "alg swapped to ES384": (bearer(with_header({"alg": "ES384", "kid": OURS.kid})), 401),
    "an RSA key's token": (bearer(RSA.token(BOTH, now=NOW)), 401),
    "an RSA key's token under our kid": (
        bearer(RSA.token(BOTH, now=NOW, header={"kid": OURS.kid})),
        401,
    ),
    "a P-384 key's token": (bearer(P384.token(BOTH, now=NOW)), 401),
    "EdDSA, which is not configured": (bearer(EDDSA.token(BOTH, now=NOW)), 401),
    # the key and the signature
    "another key": (bearer(SIBLING.token(BOTH, now=NOW)), 401),
    "another key under our kid": (
        bearer(SIBLING.token(BOTH, now=NOW, header={"kid": OURS.kid})),
        401,
    ),
    "its key brought along (jwk)": (
        bearer(SIBLING.token(BOTH, now=NOW, header={"jwk": SIBLING.jwk()})),
        401,
    ),
    "its key to be fetched (jku)": (
        bearer(SIBLING.token(BOTH, now=NOW, header={"jku": "http://127.0.0.1/k"})),
        401,
    ),
    "its certificate brought along (x5c)": (
        bearer(
            SIBLING.token(
                BOTH,
                now=NOW,
                header={"x5c": ["".join(SIBLING.certificate.decode().split("\n")[1:-2])]},
            )
        ),
        401,
    ),
    "kid a number": (bearer(with_header({"alg": "ES256", "kid": 1})), 401),
    "kid null": (bearer(with_header({"alg": "ES256", "kid": None})), 401),
    "kid a path": (bearer(with_header({"alg": "ES256", "kid": "../../../../dev/null"})), 401),
    "a flipped bit in the header": (bearer(flipped(good(), 0)), 401),
    "a flipped bit in the payload": (bearer(flipped(good(), 1)), 401),
    "a flipped bit in the signature": (bearer(flipped(good(), 2)), 401),
    "another token's signature": (
        bearer(".".join([*parts(good())[:2], parts(good(pulls(TARGET)))[2]])),
        401,
    ),
    "r and s zero": (bearer(".".join([*parts(good())[:2], b64(bytes(64))])), 401),
    "a DER signature": (bearer(der_signature()), 401),
    "a signature of 1 byte": (bearer(".".join([*parts(good())[:2], "AA"])), 401),
    "an unknown critical header": (
        bearer(OURS.token(BOTH, now=NOW, header={"crit": ["x"], "x": 1})),
        401,
    ),
    "a header that is a list": (bearer(with_header("[]")), 401),
    "a header that nests 5000 deep": (bearer(with_header("[" * 5000)), 401),
    "a header that is not UTF-8": (
        bearer(f"{b64(bytes([0xFF] * 30))}.{parts(good())[1]}.{parts(good())[2]}"),
        401,
    ),
    "an unencoded payload (b64)": (
        bearer(with_header({"alg": "ES256", "b64": False, "crit": ["b64"]})),
        401,
    ),
    # time
    "expired": (bearer(good(exp=NOW - LEEWAY)), 401),
    "expired by a year": (bearer(good(exp=NOW - 31_536_000)), 401),
    "not yet": (bearer(good(nbf=NOW + LEEWAY + 1)), 401),
    "no exp": (bearer(good(exp=...)), 401),
    "exp null": (bearer(good(exp=None)), 401),
    "exp text": (bearer(good(exp=str(int(NOW + 60)))), 401),
    "exp true": (bearer(good(exp=True)), 401),
    "exp NaN": (bearer(raw(json.dumps(OURS.claims(BOTH, now=NOW, exp=float("nan"))))), 401),
    "exp infinite": (bearer(raw(json.dumps(OURS.claims(BOTH, now=NOW, exp=float("inf"))))), 401),
    "exp of 400 digits": (bearer(good(exp=10**400)), 401),
    "exp of no date": (bearer(good(exp=2**63 - 86400)), 401),
    "exp at the bound": (bearer(good(exp=10**11)), 401),
    "nbf of no date": (bearer(good(nbf=-(10**11))), 401),
    "nbf text": (bearer(good(nbf="0")), 401),
    # issuer, audience, subject
    "another issuer": (bearer(good(iss="api.example.org")), 401),
    "no issuer": (bearer(good(iss=...)), 401),
    "the issuer in a list": (bearer(good(iss=[ISSUER])), 401),
    "the issuer in upper case": (bearer(good(iss=ISSUER.upper())), 401),
    "another audience": (bearer(good(aud="registry.example.org")), 401),
    "an audience that begins like ours": (bearer(good(aud=AUDIENCE + ".evil.example")), 401),
    "no audience": (bearer(good(aud=...)), 401),
    "an empty audience": (bearer(good(aud=[])), 401),
    "other audiences": (bearer(good(aud=["a", "b", 3, None])), 401),
    "the audience as an object": (bearer(good(aud={AUDIENCE: 1})), 401),
    "a subject that is a number": (bearer(good(sub=7)), 401),
    # what is signed is not what it should be
    "claims that are a list": (bearer(raw("[]")), 401),
    "claims that are not JSON": (bearer(raw("{")), 401),
    "claims that nest 5000 deep": (bearer(raw("[" * 5000)), 401),
    "claims that are not UTF-8": (bearer(raw(b"\xff\xfe{}")), 401),
    "access an object": (bearer(good({"type": "repository"})), 401),
    "access text": (bearer(good("repository:v2/x:pull")), 401),
    "access of texts": (bearer(good(["repository:v2/x:pull"])), 401),
    "actions text": (bearer(good([entry(actions="pull")])), 401),
    "an action that is a number": (bearer(good([entry(actions=[1])])), 401),
    "an entry without a name": (bearer(good([{"type": "repository", "actions": ["pull"]}])), 401),
    "an entry without a type": (bearer(good([{"name": TARGET, "actions": ["pull"]}])), 401),
    "an alias that is a list": (bearer(good([entry(alias=["x"])])), 401),
    # valid, but not enough
    "no access": (bearer(good(...)), 403),
    "access null": (bearer(good(None)), 403),
    "access empty": (bearer(good([])), 403),
    "no actions": (bearer(good([entry(), entry(name=BASE, actions=[])])), 403),
    "actions null": (bearer(good([entry(), entry(name=BASE, actions=None)])), 403),
    "push only": (bearer(good([entry(), entry(name=BASE, actions=["push"])])), 403),
    "all actions by a star": (bearer(good([entry(), entry(name=BASE, actions=["*"])])), 403),
    "PULL": (bearer(good([entry(), entry(name=BASE, actions=["PULL"])])), 403),
    "pull,push as one": (bearer(good([entry(), entry(name=BASE, actions=["pull,push"])])), 403),
    "one of the two images": (bearer(good(pulls(TARGET))), 403),
    "the other of the two": (bearer(good(pulls(BASE))), 403),
    "a prefix of the name": (bearer(good(pulls(TARGET, BASE[:-1]))), 403),
    "a longer name": (bearer(good(pulls(TARGET, BASE + "-1"))), 403),
    "the name's folder": (bearer(good(pulls(TARGET, "v2"))), 403),
    "a star as the name": (bearer(good(pulls(TARGET, "*", "v2/*", ""))), 403),
    "the name in upper case": (bearer(good(pulls(TARGET, BASE.upper()))), 403),
    "the name with a slash": (bearer(good(pulls(TARGET, BASE + "/", "/" + BASE))), 403),
    "the name with dots": (bearer(good(pulls(TARGET, "v2/../" + BASE))), 403),
    "the name with a host": (bearer(good(pulls(TARGET, f"{AUDIENCE}/{BASE}"))), 403),
    "the name with a tag": (bearer(good(pulls(TARGET, BASE + ":latest"))), 403),
    "an entry of another type": (bearer(good([entry(), entry(name=BASE, type="registry")])), 403),
    "a plugin of the name": (
        bearer(good([entry(), entry(name=BASE, type="repository(plugin)")])),
        403,
    ),
    "only an alias of that name": (
        bearer(good([entry(), entry(name="v2/" + "c" * 32, alias=BASE)])),
        403,
    ),
}
HONEST: dict[str, bytes] = {
    "as the API makes it": bearer(good()),
    "scheme in lower case": b"bearer " + good().encode(),
    "more blanks": b" Bearer   " + good().encode() + b"  ",
    "two entries for two images": bearer(good([*pulls(BASE), *pulls(TARGET)])),
    "two entries for one image": bearer(good([entry(actions=["push"]), entry(), entry(name=BASE)])),
    "pull beside push": bearer(good([entry(actions=["push", "pull"]), entry(name=BASE)])),
    "an alias beside": bearer(good([entry(), entry(name=BASE, alias="org/app")])),
    "other types beside": bearer(
        good([{"type": "registry", "name": "catalog", "actions": ["*"]}, *BOTH])
    ),
    "audience in a list": bearer(good(aud=["x", AUDIENCE])),
    "no subject": bearer(good(subject="")),
    "subject null": bearer(good(subject=None)),
    "no nbf": bearer(good(nbf=...)),
    "fractions of seconds": bearer(good(exp=NOW + 0.5)),
    "expired within the leeway": bearer(good(exp=NOW - LEEWAY + 1)),
    "early within the leeway": bearer(good(nbf=NOW + LEEWAY)),
    "kid unknown, with one key": bearer(OURS.token(BOTH, now=NOW, header={"kid": "gone"})),
    "as large as allowed": bearer(good(pad="x" * 11000)),
}
