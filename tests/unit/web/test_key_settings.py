"""Settings and variables that name the key of tokens, as a server's start reads them."""

from __future__ import annotations

import base64
import hmac
import json
from pathlib import Path

import pytest

from obdelta.app.access import make_access
from obdelta.errors import SettingsError, Unauthorized
from obdelta.settings import read
from obdelta.settings.parsers import ALGORITHMS as SETTABLE
from obdelta.web.devices.access.admission import TokenAccess
from obdelta.web.devices.access.token_keys import (
    ALGORITHMS,
)
from tests.support.token_keys import ISSUERS, NOW, OURS, Clock, ask
from tests.support.tokens import (
    Issuer,
    private_pem,
    pulls,
)


def configured(environment: dict[str, str], **options: str) -> TokenAccess:
    """Returns the access that the server's start makes of these settings."""
    given = {"upstream": "https://registry2.example.com", "public-url": "https://delta.example.com"}
    found = read(
        {**given, **{key.replace("_", "-"): value for key, value in options.items()}}, environment
    )
    access = make_access(found, Clock())
    assert isinstance(access, TokenAccess)
    return access


def test_without_a_key_the_server_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"auth-key is missing: .*api.<domain>.pem.*TOKEN_AUTH_CERT_PUB.*auth = none",
    ):
        configured({})
    with pytest.raises(
        SettingsError, match=r"auth-key .*/certs/private/api\.nowhere\.example\.pem.*No such file"
    ):
        configured({"BALENA_TLD": "nowhere.example"})
    with pytest.raises(SettingsError, match=r"auth-issuer is missing: .*BALENA_TLD"):
        configured({}, auth_key=str(OURS.write(tmp_path)))
    (tmp_path / "key.pem").write_bytes(private_pem(OURS.key))
    with pytest.raises(SettingsError, match="private key"):
        configured({"BALENA_TLD": "example.com"}, auth_key=str(tmp_path / "key.pem"))
    secret = base64.b64encode(private_pem(OURS.key)).decode()
    with pytest.raises(SettingsError, match=r"base64.*private key") as refused:
        configured({"BALENA_TLD": "example.com", "TOKEN_AUTH_CERT_PUB": secret})
    assert secret[20:40] not in str(refused.value)
    with pytest.raises(SettingsError, match="base64"):
        configured({"TOKEN_AUTH_CERT_PUB": base64.b64encode(OURS.public).decode()[:-3]})
    (tmp_path / "large").write_bytes(b"{" + b" " * (1 << 20))
    with pytest.raises(SettingsError, match="larger"):
        configured({"BALENA_TLD": "example.com"}, auth_key=str(tmp_path / "large"))
    with pytest.raises(SettingsError, match=r"jwt-algorithm has the value 'HS256'.*ES256"):
        configured({"JWT_ALGO": "HS256"})


@pytest.mark.parametrize("issuer", ISSUERS.values(), ids=ISSUERS.keys())
def test_the_type_of_the_key_decides_on_the_algorithm(issuer: Issuer, tmp_path: Path) -> None:
    access = configured({"BALENA_TLD": "example.com"}, auth_key=str(issuer.write(tmp_path)))
    assert ask(access, issuer).allows("v2/a")
    _, payload, signature = issuer.token(pulls("v2/a"), now=NOW).split(".")

    def headed(algorithm: str) -> str:
        header = json.dumps({"alg": algorithm, "kid": issuer.kid}).encode()
        return f"{base64.urlsafe_b64encode(header).decode().rstrip('=')}.{payload}"

    for algorithm in (ALGORITHMS | {"HS256", "none"}) - {issuer.algorithm}:
        with pytest.raises(Unauthorized):
            access.authorize(f"Bearer {headed(algorithm)}.{signature}".encode(), ["v2/a"])
    for secret in (issuer.public, issuer.public.strip(), issuer.certificate):
        digest = hmac.digest(secret, headed("HS256").encode(), "sha256")
        made = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        with pytest.raises(Unauthorized):
            access.authorize(f"Bearer {headed('HS256')}.{made}".encode(), ["v2/a"])


def test_openbalenas_environment_names_the_key() -> None:
    pem = base64.b64encode(OURS.certificate).decode()
    access = configured(
        {"BALENA_TLD": "example.com", "JWT_ALGO": "ES256", "TOKEN_AUTH_CERT_PUB": pem}
    )
    assert ask(access, OURS)
    with pytest.raises(Unauthorized) as missing:
        access.authorize(None, ["v2/a"])
    assert missing.value.challenge == (
        'Bearer realm="https://api.example.com/auth/v1/token",service="registry2.example.com",scope="repository:v2/a:pull"'
    )
    # open-balena-helm's registry is registry.<domain>, and its API says so in the audience
    helm = {
        "BALENA_TLD": "example.com",
        "REGISTRY_HOST": "registry.example.com",
        "TOKEN_AUTH_CERT_PUB": pem,
    }
    assert ask(configured(helm), OURS, aud="registry.example.com")
    exact = {
        **helm,
        "REGISTRY_TOKEN_AUDIENCE": "audience.example",
        "TOKEN_AUTH_CERT_ISSUER": "issuer.example",
    }
    assert ask(configured(exact), OURS, aud="audience.example", iss="issuer.example")
    for claims in ({"aud": "audience.example"}, {"iss": "issuer.example"}):
        with pytest.raises(Unauthorized):
            ask(configured(exact), OURS, **claims)
    rsa256 = ISSUERS["RS256"]
    named = {
        **helm,
        "TOKEN_AUTH_CERT_PUB": base64.b64encode(rsa256.public).decode(),
        "TOKEN_AUTH_JWT_ALGO": "RS256",
    }
    assert ask(configured(named), rsa256)


def test_the_settings_name_all_algorithms() -> None:
    assert set(SETTABLE) == ALGORITHMS
