"""Keys that verify tokens: their formats, refused files, and changes while the server runs."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from obdelta.concurrency.watched_file import FileProblem
from obdelta.errors import Unauthorized
from obdelta.settings.parsers import path_or_pem
from obdelta.web.devices.access.token_keys import (
    ALGORITHMS,
    KeyFile,
    KeyUnusable,
    load_keys,
    parse_keys,
)
from tests.support.logs import logged
from tests.support.token_keys import ISSUERS, NOW, OTHER, OURS, Clock, access_with, ask
from tests.support.tokens import (
    ISSUER,
    Issuer,
    make_certificate,
    make_key,
    private_pem,
    public_pem,
    pulls,
)


@pytest.mark.parametrize("issuer", ISSUERS.values(), ids=ISSUERS.keys())
def test_every_key_type_is_read_in_every_format(issuer: Issuer, tmp_path: Path) -> None:
    issuer.write(tmp_path)
    texts = {
        "certificate": (tmp_path / f"{ISSUER}.pem").read_bytes(),
        "key set": (tmp_path / f"{ISSUER}.jwks.json").read_bytes(),
        "public key": issuer.public,
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(text)
        keys = load_keys(path, [issuer.algorithm], Clock())
        assert ask(access_with(keys, Clock()), issuer).allows("v2/a")
    # TOKEN_AUTH_CERT_PUB, also wrapped as `base64` prints it
    for encoded in (base64.b64encode(issuer.public), base64.encodebytes(issuer.certificate)):
        keys = load_keys(path_or_pem(encoded.decode()), [issuer.algorithm], Clock())
        assert ask(access_with(keys, Clock()), issuer).allows("v2/a")


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_key_verifies_only_what_fits_its_type_and_the_setting(algorithm: str) -> None:
    issuer = Issuer(algorithm)
    every = parse_keys(issuer.public, ALGORITHMS)[0].algorithms
    assert algorithm in every and len(every) == (6 if algorithm[:2] in ("RS", "PS") else 1)
    assert parse_keys(issuer.public, [algorithm])[0].algorithms == {algorithm}
    for other in ALGORITHMS - every:
        with pytest.raises(KeyUnusable, match="jwt-algorithm"):
            parse_keys(issuer.public, [other])


def test_an_rsa_key_does_not_verify_an_algorithm_that_is_not_set(tmp_path: Path) -> None:
    issuer = ISSUERS["RS256"]
    keys = load_keys(issuer.write(tmp_path), ["RS256"], Clock())
    assert ask(access_with(keys, Clock()), issuer)
    for algorithm in ("RS512", "PS256"):
        with pytest.raises(Unauthorized):
            ask(access_with(keys, Clock()), issuer, header={"alg": algorithm})


def test_only_the_leaf_of_a_chain_verifies_tokens() -> None:
    ca_key = make_key("ES256")
    ca = make_certificate(ca_key, "ca.example.com")
    leaf = make_certificate(OURS.key, ISSUER, signer=(x509.load_pem_x509_certificate(ca), ca_key))
    (key,) = parse_keys(leaf + ca, ["ES256"])
    assert key.key == OURS.key.public_key()


def jwks(*entries: Any) -> bytes:
    return json.dumps({"keys": list(entries)}).encode()


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"\x00\xff" * 50,
    "text": b"ssh-ed25519 AAAA",
    "a broken certificate": OURS.certificate[:-60],
    "a broken public key": OURS.public.replace(b"MFkw", b"MFkx"),
    "a private key": private_pem(OURS.key),
    "a certificate with its private key": OURS.certificate + private_pem(OURS.key),
    "several public keys": OURS.public + OTHER.public,
    "a short RSA key": public_pem(rsa.generate_private_key(65537, 1024)),
    "a curve that JWT does not use": public_pem(ec.generate_private_key(ec.SECP256K1())),
    "JSON that is no key set": b'{"hello": 1}',
    "broken JSON": b'{"keys": [',
    "JSON that nests": b'{"keys":' + b"[" * 100_000,
    "keys that are no list": b'{"keys": {}}',
    "keys that are no objects": jwks("x"),
    "an empty key set": jwks(),
    "too many keys": jwks(*[OURS.jwk(kid=str(n)) for n in range(33)]),
    "a shared secret": jwks({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
    "a private JWK": jwks(OURS.jwk(d="AAAA")),
    "a key for encryption": jwks(OURS.jwk(use="enc")),
    "a key of another algorithm": jwks(OURS.jwk(alg="RS256")),
    "an unknown algorithm": jwks(OURS.jwk(alg="HS256")),
    "a point off the curve": jwks(OURS.jwk(y="A" * 43)),
    "a missing coordinate": jwks(
        {name: value for name, value in OURS.jwk().items() if name != "y"}
    ),
    "a coordinate that is a number": jwks(OURS.jwk(x=1)),
    "a kid that is a number": jwks(OURS.jwk(kid=1)),
    "a short RSA JWK": jwks(
        {**ISSUERS["RS256"].jwk(), "n": base64.urlsafe_b64encode(b"\xff" * 128).decode()}
    ),
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_files_without_a_key_are_refused(text: bytes) -> None:
    with pytest.raises(KeyUnusable) as refused:
        parse_keys(text, ["ES256", "RS256"])
    for line in text.split():
        assert len(line) < 20 or line.decode("latin-1") not in str(refused.value)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.sampled_from([OURS.jwks(), OURS.public, OURS.certificate]).flatmap(
        lambda text: st.integers(0, len(text) - 1).map(lambda at: text[:at] + b"~" + text[at + 1 :])
    )
)
def test_no_file_breaks_the_parser(text: bytes) -> None:
    try:
        keys = parse_keys(text, ["ES256"])
    except KeyUnusable:
        return
    assert all(key.algorithms == {"ES256"} for key in keys)


def replace(path: Path, content: bytes) -> None:
    """Replaces a file as careful writers do: by another file of the same name."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)


def test_a_changed_file_is_read_again_after_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "key.pem", Clock()
    path.write_bytes(OURS.public)
    access = access_with(KeyFile(path, ["ES256"], clock), clock)
    assert ask(access, OURS)
    replace(path, OTHER.public)
    clock.seconds += 0.9
    assert ask(access, OURS)
    clock.seconds += 0.1
    # The old key's tokens are refused too, though one of them was verified and remembered.
    with pytest.raises(Unauthorized):
        ask(access, OURS)
    assert ask(access, OTHER)


def test_a_remembered_token_does_not_outlive_its_key(tmp_path: Path) -> None:
    path, clock = tmp_path / "key.pem", Clock()
    path.write_bytes(OURS.public)
    access = access_with(KeyFile(path, ["ES256"], clock), clock)
    header = b"Bearer " + OURS.token(pulls("v2/a"), now=NOW).encode()
    assert access.authorize(header, ["v2/a"])
    replace(path, OTHER.public)
    clock.seconds += 1
    with pytest.raises(Unauthorized, match="signature"):
        access.authorize(header, ["v2/a"])


@pytest.mark.parametrize(
    "broken", [b"", OURS.public[:40], private_pem(OTHER.key), ISSUERS["RS256"].public, None]
)
def test_a_broken_file_keeps_the_old_key(broken: bytes | None, tmp_path: Path) -> None:
    path, clock = tmp_path / "key.pem", Clock()
    path.write_bytes(OURS.public)
    access = access_with(KeyFile(path, ["ES256"], clock), clock)
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
        os.utime(path, ns=(1, 1))
    with logged("error") as lines:
        for _ in range(5):
            clock.seconds += 1
            assert ask(access, OURS)
    assert len(lines) == 1 and str(path) in lines[0] and "old key" in lines[0]
    path.write_bytes(OTHER.public)
    clock.seconds += 1
    assert ask(access, OTHER)


def test_why_a_file_is_unusable_lasts_until_it_is_repaired(tmp_path: Path) -> None:
    path, clock = tmp_path / "key.pem", Clock()
    path.write_bytes(OURS.public)
    keys = KeyFile(path, ["ES256"], clock)
    assert keys.problem() is None
    path.unlink()
    clock.seconds += 1
    removed = clock.seconds
    why = "No such file or directory"
    assert keys.problem() == FileProblem(path, why, removed, "auth-key")
    path.write_bytes(b"")
    clock.seconds += 5
    broken = keys.problem()
    assert broken is not None and broken.since == removed and broken.why != why
    path.write_bytes(OURS.public)
    clock.seconds += 1
    assert keys.problem() is None


def test_a_key_added_to_a_set_while_running(tmp_path: Path) -> None:
    """A rotation: the new key is published beside the old one, then it signs, then the old one is
    removed.
    """
    path, clock = tmp_path / "api.jwks.json", Clock()
    path.write_bytes(OURS.jwks())
    access = access_with(KeyFile(path, ["ES256"], clock), clock)
    assert ask(access, OURS)
    replace(path, OURS.jwks(OTHER))
    clock.seconds += 1
    assert ask(access, OURS) and ask(access, OTHER)
    replace(path, OTHER.jwks())
    clock.seconds += 1
    assert ask(access, OTHER)
    with pytest.raises(Unauthorized):
        ask(access, OURS)
