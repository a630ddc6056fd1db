"""Refused requests of devices: the log says why, the server remembers them, and ``obdelta trace``
shows them. Real servers, of one process and of two, before Debian's registry with tokens.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import error_of, run
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.processes import serving, until
from tests.support.server import RunningServer
from tests.support.stack import Stack, stack
from tests.support.tokens import pulls

__all__ = ["stack"]

DEVICE = "d_" + "4f" * 16
OTHER = "v2/" + "c3" * 16


@pytest.fixture(scope="module", params=[1, 2])
def server(request: pytest.FixtureRequest, stack: Stack) -> Iterator[RunningServer]:
    count: int = request.param
    with stack.server(f"state-{count}", processes=str(count)) as running:
        serving(running, count - 1)
        yield running


def ask(server: RunningServer, path: str, token: str | None) -> tuple[int, str]:
    """Returns the status and the request's ID."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}{path}", headers=headers), timeout=60
        ) as answer:
            return answer.status, answer.headers["X-Request-Id"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["X-Request-Id"]


def traced(server: RunningServer, name: str) -> list[dict[str, Any]]:
    """Returns the server's trace, once there is one."""
    return until("the request is remembered", lambda: run_trace(server, name)) or []


def run_trace(server: RunningServer, name: str) -> list[dict[str, Any]] | None:
    url = f"{server.operator_url}/api/v1/trace/{name}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return list(json.load(answer)["requests"])
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return None


def refusal(server: RunningServer, request: str) -> str:
    """Returns the log line that says why a request was refused. There is one."""

    def logged() -> list[str]:
        return [
            line
            for line in server.log.splitlines()
            if "] refused: " in line and line.endswith(f"request={request}")
        ]

    (line,) = until("the refusal is in the log", logged)
    return line


def test_each_refusal_is_logged_and_remembered_with_its_reason(
    server: RunningServer, stack: Stack
) -> None:
    delta = (
        f"/api/v3/delta?src={server.host}/{BASE_REPOSITORY}&dest={server.host}/{TARGET_REPOSITORY}"
    )
    manifest = f"/v2/{TARGET_REPOSITORY}/manifests/latest"
    images = f"{server.host}/{BASE_REPOSITORY} -> {server.host}/{TARGET_REPOSITORY}"
    one = stack.issuer.token(pulls(BASE_REPOSITORY), sub=DEVICE)
    both = stack.issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY), sub=DEVICE)
    expired = stack.issuer.token(pulls(TARGET_REPOSITORY), sub=DEVICE, exp=int(time.time()) - 999)
    audience = stack.issuer.token(pulls(TARGET_REPOSITORY), sub=DEVICE, aud="elsewhere")
    gone = f"/v2/{TARGET_REPOSITORY}/manifests/gone"
    blob = f"/v2/{TARGET_REPOSITORY}/blobs/sha256:" + "0" * 64
    latest = f"{TARGET_REPOSITORY}:latest"
    for path, token, status, subject, image, reason in (
        (delta, one, 403, DEVICE, images, "does not allow pull on " + TARGET_REPOSITORY),
        (manifest, one, 403, DEVICE, latest, "does not allow pull on " + TARGET_REPOSITORY),
        (manifest, None, 401, "-", latest, "a token is needed"),
        (manifest, expired, 401, DEVICE, latest, "the token has expired"),
        (manifest, audience, 401, "-", latest, "the token is for another audience"),
        (gone, both, 404, DEVICE, f"{TARGET_REPOSITORY}:gone", "404"),
        (blob, both, 404, DEVICE, blob[4:].replace("/blobs/", "@"), "404"),
        ("/nothing", both, 404, DEVICE, "-", "there is nothing at this path"),
    ):
        got, request = ask(server, path, token)
        assert got == status
        line = refusal(server, request)
        assert f"status={status} subject={subject} peer=127.0.0.1 image={image} reason=" in line
        assert reason in line.partition(" reason=")[2]
        (trace,) = traced(server, request)
        assert trace["status"] == status
        assert trace["reason"] in line
        assert (trace["subject"] or "-", trace["image"] or "-") == (subject, image)
        assert trace["end"] == "done"
    for token in (one, both, expired, audience):
        assert token not in server.log
        assert token.rpartition(".")[2] not in json.dumps(run_trace(server, DEVICE))


def test_requests_of_a_device_are_found_by_its_uuid_and_address(
    server: RunningServer, stack: Stack
) -> None:
    uuid = "ab" * 16
    token = stack.issuer.token(pulls(TARGET_REPOSITORY), sub=f"d_{uuid}")
    served, first = ask(server, f"/v2/{TARGET_REPOSITORY}/manifests/latest", token)
    refused, second = ask(server, f"/v2/{OTHER}/manifests/latest", token)
    assert (served, refused) == (200, 403)
    until("both requests are remembered", lambda: len(run_trace(server, uuid) or ()) == 2)
    found = traced(server, uuid)
    assert [trace["request"] for trace in found] == [second, first]
    assert {trace["request"] for trace in traced(server, "127.0.0.1")} >= {first, second}
    ran = run("trace", uuid, "--operator", server.operator_url)
    head, *rows = ran.stdout.decode().splitlines()
    assert head.split() == [
        "age",
        "status",
        "sent",
        "took",
        "end",
        "request",
        "image",
        "path",
        "reason",
    ]
    assert [first in rows[1], second in rows[0]] == [True, True]
    one = run("trace", second, "--operator", server.operator_url).stdout.decode()
    assert re.search(r"^reason +denied: .*" + OTHER, one, re.MULTILINE)
    assert re.search(rf"^subject +d_{uuid}$", one, re.MULTILINE)
    listed = run("trace", "--operator", server.operator_url, "--json").stdout
    clients = {client["client"]: client for client in json.loads(listed)["refused"]}
    assert clients[f"d_{uuid}"]["count"] == 1
    assert clients[f"d_{uuid}"]["last"]["request"] == second
    assert f"d_{uuid}" in run("trace", "--operator", server.operator_url).stdout.decode()
    # A table has the beginnings of digests; one request has all of it.
    digest = "sha256:" + "0123456789ab" + "c" * 52
    _, named = ask(server, f"/v2/{TARGET_REPOSITORY}/manifests/{digest}", token)
    until("it is remembered", lambda: len(run_trace(server, uuid) or ()) == 3)
    table = run("trace", uuid, "--operator", server.operator_url).stdout.decode()
    assert f"{TARGET_REPOSITORY}@0123456789ab " in table and digest not in table
    assert digest in run("trace", named, "--operator", server.operator_url).stdout.decode()


def test_an_unknown_request_is_an_error(server: RunningServer) -> None:
    ran = run("trace", "nobody/at all", "--operator", server.operator_url, status=1)
    assert "no request of nobody/at all is remembered" in error_of(ran)


def test_the_first_ping_without_a_token_counts_as_no_refusal(
    server: RunningServer, tmp_path: Path
) -> None:
    before = json.loads(run("trace", "--operator", server.operator_url, "--json").stdout)
    status, request = ask(server, "/v2/", None)
    assert status == 401
    traced(server, request)
    after = json.loads(run("trace", "--operator", server.operator_url, "--json").stdout)
    assert [one["client"] for one in after["refused"]] == [
        one["client"] for one in before["refused"]
    ]
