"""No token, password, key or signature appears in log lines of either format at the lowest level,
in errors, on pages, in metrics, in stored files, or in the output of commands.

The real server and docker-registry, both with token authentication.
"""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from bench.images import push
from tests.support.commands import OBDELTA, environment
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.processes import connection_to, serving
from tests.support.registry import BUILDER_TOKEN, RunningRegistry, running_token_registry
from tests.support.server import RunningServer, running_server
from tests.support.tokens import AUDIENCE, Issuer, private_pem, pulls

WAYS = {
    "device": {"log_format": "json", "processes": "2"},
    "builder": {"log_format": "text", "processes": "1"},
}
"""Whose credentials are used for the upstream. Each log format is used once more at the usual
level in test_server_tokens.
"""
UNHEARD = "a-word-that-stands-for-a-secret"
PAGES = (
    "/",
    "/metrics",
    "/readyz",
    "/api/v1/status",
    "/api/v1/builds",
    "/api/v1/nothing",
    "/api/v1/deltas/list",
    "/api/v1/trace",
    "/api/v1/trace/127.0.0.1",
    "/deltas",
    "/fleets",
    "/openapi.yaml",
)


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer("ES256")


@pytest.fixture(scope="module")
def registry(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    pair = make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)
    with running_token_registry(tmp_path_factory.mktemp("registry"), issuer) as running:
        assert running.tokens is not None
        for repository, image in {
            BASE_REPOSITORY: pair.base,
            TARGET_REPOSITORY: pair.target,
        }.items():
            push(
                image,
                running.url,
                repository,
                "latest",
                authorization=running.tokens.push_authorization(repository),
            )
        yield running


class Asking:
    """Keeps the bodies of error answers."""

    def __init__(self) -> None:
        self.bodies: list[str] = []

    def __call__(
        self, url: str, authorization: str | None = None, *, method: str = "GET", **headers: str
    ) -> tuple[int, bytes, str]:
        own = {"Authorization": authorization} if authorization is not None else {}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        body = b'{"pairs": []}' if method == "POST" else None
        request = urllib.request.Request(url, body, {**own, **sent}, method=method)
        opener = urllib.request.build_opener(Unfollowed)
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read(), ""
        except urllib.error.HTTPError as error:
            with error:
                content = error.read()
                if error.code >= 400:
                    self.bodies.append(content.decode("utf-8", "replace") + str(error.headers))
                return error.code, content, error.headers.get("location", "")


class Unfollowed(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("credentials", WAYS)
def test_no_secret_is_in_logs_pages_or_errors(
    credentials: str, issuer: Issuer, registry: RunningRegistry, tmp_path: Path
) -> None:
    ask = Asking()
    good = issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY))
    other = issuer.token(pulls("v2/another"))
    login = base64.b64encode(f"d_1:{UNHEARD}".encode()).decode()
    with running_server(
        tmp_path / "state",
        upstream=registry.url,
        environment={"OBDELTA_BUILDER_TOKEN": BUILDER_TOKEN} if credentials == "builder" else {},
        upstream_credentials=credentials,
        log_level="debug",
        auth="token",
        auth_key=str(issuer.write(tmp_path)),
        auth_issuer=issuer.issuer,
        auth_audience=AUDIENCE,
        auth_realm="https://api.example.com/auth/v1/token",
        log_format=WAYS[credentials]["log_format"],
        processes=WAYS[credentials]["processes"],
    ) as server:
        signature = devices_ask(server, ask, good, other, login)
        pages = operators_ask(server, ask, good)
        pages += command_outputs(server, tmp_path, good, other)
        log = server.log
    with closing(sqlite3.connect(tmp_path / "state/catalogue.sqlite")) as catalogue:
        kept = "\n".join(catalogue.iterdump())
    url_key = (tmp_path / "state/url-key").read_bytes()
    secrets = {
        signature,
        login,
        UNHEARD,
        BUILDER_TOKEN,
        base64.b64encode(f"builder:{BUILDER_TOKEN}".encode()).decode(),
    }
    secrets |= {url_key.hex(), base64.b64encode(url_key).decode()}
    secrets |= set(private_pem(issuer.key).decode().splitlines()[1:-1])
    secrets |= {part for token in (good, other) for part in token.split(".")[1:]}
    assert len(secrets) > 12 and all(len(secret) >= 4 for secret in secrets)
    assert TARGET_REPOSITORY in kept
    for text in [log, kept, *pages, *ask.bodies]:
        assert not [secret[:12] for secret in secrets if secret in text]
        assert "Traceback" not in text


def test_processes_that_use_no_secret_have_none(
    issuer: Issuer, registry: RunningRegistry, tmp_path: Path
) -> None:
    """Additional server processes and worker processes parse untrusted input: the builder's token
    is not in their memory.
    """
    unused = "a-password-of-redis-for-nothing"
    with running_server(
        tmp_path / "state",
        upstream=registry.url,
        environment={"TOKEN_AUTH_BUILDER_TOKEN": BUILDER_TOKEN, "UNRELATED_PASSWORD": unused},
        upstream_credentials="builder",
        processes="2",
        max_builds="1",
    ) as server:
        (further,) = serving(server, 1)
        connection = connection_to(server, further)
        for version in (3, 2):
            names = (
                f"src={server.host}/{BASE_REPOSITORY}"
                f"&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
            )
            connection.request(
                "GET",
                f"/api/v{version}/delta?{names}",
                headers={"User-Agent": "Supervisor/14.9.4 (Linux)"},
            )
            with connection.getresponse() as answer:
                assert answer.status == (200 if version == 3 else 300), answer.read()
                answer.read()
        connection.close()
        main = server.process.pid
        others = [
            int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()
        ]
        assert further in others and len(others) >= 2
        # The search does find secrets that are there:
        assert BUILDER_TOKEN.encode() in memory(main)
        seen = 0
        for pid in others:
            with suppress(FileNotFoundError):  # a recorder that has ended
                found = memory(pid)
                assert BUILDER_TOKEN.encode() not in found and unused.encode() not in found
                seen += 1
        assert seen >= 2


def memory(pid: int) -> bytes:
    """Returns the writable memory of a process, its environment included."""
    pieces = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as source:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, kind, *_ = line.split()
            if kind.startswith("rw"):
                start, end = (int(number, 16) for number in where.split("-"))
                source.seek(start)
                pieces.append(source.read(end - start))
    return b"".join(pieces)


def devices_ask(server: RunningServer, ask: Asking, good: str, other: str, login: str) -> str:
    """Sends valid and invalid device requests of every kind; returns the signature of a download's
    URL.
    """
    names = f"src={server.host}/{BASE_REPOSITORY}&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    delta = f"{server.url}/api/v3/delta?{names}"
    status, body, _ = ask(delta, f"Bearer {good}")
    assert status == 200, body
    name = json.loads(body)["name"].partition("/")[2].rpartition(":")
    manifest = f"{server.url}/v2/{name[0]}/manifests"
    assert ask(f"{manifest}/{name[2]}", f"Bearer {good}")[0] == 200
    assert ask(f"{delta}&token={good}&password={UNHEARD}", f"Bearer {good}")[0] in (200, 400)
    for path in (delta, f"{manifest}/latest", f"{manifest}/none", f"{server.url}/v2/"):
        for authorization in (
            f"Bearer {good}x",
            f"Bearer {other}",
            f"Basic {login}",
            f"bearer  {good}",
            good,
            UNHEARD,
        ):
            assert ask(path, authorization, X_Request_Id=good[-64:])[0] in (200, 400, 401, 403, 404)
    status, _, location = ask(f"{server.url}/api/v2/delta?{names}", f"Bearer {good}")
    assert status == 300
    signature = re.search(r"signature=([0-9a-f]{64})", location)
    assert signature is not None
    assert ask(location)[0] == 200
    assert ask(location + f"&token={good}")[0] == 403
    assert ask(location.replace(signature[1], "0" * 64))[0] == 403
    return signature[1]


def operators_ask(server: RunningServer, ask: Asking, good: str) -> list[str]:
    pages = [
        ask(f"{server.operator_url}{path}?token={good}", f"Bearer {good}")[1].decode()
        for path in PAGES
    ]
    prepare, key = f"{server.operator_url}/api/v1/prepare", server.key_header["Authorization"]
    json_type = {"Content_Type": "application/json", "X_Registry_Authorization": f"Bearer {good}"}
    assert ask(prepare, f"Basic {UNHEARD}", method="POST", **json_type)[0] == 403
    assert ask(prepare, f"Bearer {UNHEARD}", method="POST", **json_type)[0] == 401
    assert ask(prepare, key, method="POST", **json_type)[0] in (200, 202, 400)
    json_type["X_Registry_Authorization"] = UNHEARD
    assert ask(prepare, key, method="POST", **json_type)[0] in (200, 202, 400)
    return pages


def command_outputs(server: RunningServer, folder: Path, good: str, other: str) -> list[str]:
    """Returns the output of commands for invalid tokens, and for a login in a URL."""
    bodies = []
    pair = [f"{server.host}/{name}" for name in (BASE_REPOSITORY, TARGET_REPOSITORY)]
    (folder / "good").write_text(good)
    (folder / "other").write_text(other)
    (folder / "login").write_text(f"user:{UNHEARD}")
    inside = environment() | {"OBDELTA_BUILDER_TOKEN": BUILDER_TOKEN}
    login = f"http://user:{UNHEARD}@127.0.0.1:9"
    for arguments, status in [
        (["check", *pair, "--server", server.url, "--token", f"@{folder}/good"], 0),
        (["check", *pair, "--server", server.url, "--token", f"@{folder}/other"], 1),
        (["status", "--operator", login], 2),
        (["status", "--operator", "http://127.0.0.1:9", "--login", f"@{folder}/login"], 1),
        (["check", *pair, "--server", login, "--registry", login], 1),
        (["build", *pair, "-o", str(folder / "out"), "--upstream", login], 2),
        (["settings", "--upstream", login, "--public-url", "http://a"], 2),
        (["settings", "--upstream", server.url, "--public-url", "http://a", "--auth", "none"], 0),
    ]:
        ran = subprocess.run(
            [*OBDELTA, *arguments], capture_output=True, text=True, check=False, env=inside
        )
        assert ran.returncode == status, (arguments, ran.stderr)
        bodies += [ran.stdout, ran.stderr]
    return bodies
