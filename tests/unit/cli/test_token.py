"""`obdelta token inspect`, and the report of `obdelta check` about a refused token."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import error_of, run
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.server import RunningServer
from tests.support.stack import Stack, stack
from tests.support.tokens import Issuer, pulls

__all__ = ["stack"]

DEVICE = "d_" + "4f" * 16


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[RunningServer]:
    with stack.server() as running:
        yield running


def options(stack: Stack) -> list[str]:
    issuer = stack.issuer
    return [
        "--auth=token",
        f"--auth-key={stack.certificate}",
        f"--auth-issuer={issuer.issuer}",
        f"--auth-audience={issuer.audience}",
        "--auth-realm=https://api.example.com/auth/v1/token",
        "--public-url=https://delta.example.com",
    ]


def inspected(stack: Stack, token: str, *images: str, status: int = 3) -> dict[str, Any]:
    ran = run(
        "token",
        "inspect",
        "-",
        *images,
        "--json",
        *options(stack),
        stdin=token.encode(),
        status=status,
    )
    assert len(token) < 20 or token.encode() not in ran.stdout
    value: dict[str, Any] = json.loads(ran.stdout)
    return value


def test_a_good_token_has_no_problem(stack: Stack, tmp_path: Path) -> None:
    token = stack.issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY), sub=DEVICE)
    found = inspected(stack, token, BASE_REPOSITORY, status=0)
    assert found["problems"] == {}
    assert found["pulls"] == [BASE_REPOSITORY, TARGET_REPOSITORY]
    assert found["claims"]["sub"] == DEVICE
    file = tmp_path / "token"
    file.write_text(token)
    text = run("token", "inspect", f"@{file}", *options(stack)).stdout.decode()
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert list(rows) == ["claim", "signature", "sub", "iss", "aud", "nbf", "exp", "access"]
    assert all(line.endswith("ok") for name, line in rows.items() if name != "claim")
    assert f"pull on {BASE_REPOSITORY}, {TARGET_REPOSITORY}" in rows["access"]
    assert token not in text


def test_each_claim_that_is_refused_is_named_with_what_is_expected(stack: Stack) -> None:
    past = int(time.time()) - 3600
    token = stack.issuer.token(
        pulls(BASE_REPOSITORY), iss="someone", aud="elsewhere", exp=past, sub=DEVICE
    )
    assert inspected(stack, token, TARGET_REPOSITORY)["problems"] == {
        "iss": f"the token is from another issuer: expected {stack.issuer.issuer}",
        "aud": f"the token is for another audience: expected {stack.issuer.audience}",
        "exp": "the token has expired",
        "access": f"the token does not allow pull on {TARGET_REPOSITORY}",
    }


def test_a_forged_token_is_reported_and_its_claims_are_printed(stack: Stack) -> None:
    forged = Issuer().token(pulls(BASE_REPOSITORY), sub=DEVICE)
    found = inspected(stack, forged)
    assert set(found["problems"]) >= {"signature"}
    assert found["claims"]["sub"] == DEVICE


@pytest.mark.parametrize("text", ["x", "a.b.c", "..", "\x00", "e30.e30.e30"])
def test_text_that_is_no_token_is_reported(stack: Stack, text: str) -> None:
    assert "signature" in inspected(stack, text)["problems"]


def test_without_tokens_there_is_nothing_to_inspect(tmp_path: Path) -> None:
    ran = run("token", "inspect", "-", "--auth=none", "--public-url=http://localhost", status=2)
    assert "auth = none" in error_of(ran)


def test_check_prints_the_claims_of_a_refused_token(
    stack: Stack, server: RunningServer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    names = stack.names()
    for token, message in (
        (
            stack.issuer.token(pulls(BASE_REPOSITORY), sub=DEVICE),
            f"the token states sub {DEVICE}, iss {stack.issuer.issuer}, aud",
        ),
        (
            stack.issuer.token(
                pulls(BASE_REPOSITORY, TARGET_REPOSITORY), exp=int(time.time()) - 9 * 3600
            ),
            "expired 9 h ago, pull on " + BASE_REPOSITORY,
        ),
        ("nonsense", "the token cannot be read"),
    ):
        file.write_text(token)
        error = error_of(
            run(
                "check",
                *names,
                "--server",
                server.url,
                "--registry",
                server.url,
                "--token",
                f"@{file}",
                status=1,
            )
        )
        assert message in error
        assert token.rpartition(".")[2] not in error or token == "nonsense"
