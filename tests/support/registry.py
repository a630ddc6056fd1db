"""Debian's real ``docker-registry`` on a free loopback port: open, with htpasswd, or with
openBalena's token authentication.

The token server is a double of open-balena-api's ``/auth/v1/token``: it checks Basic credentials
against a table and signs what that table grants. The registry that verifies its tokens is the real
one.

As fixtures: ``from tests.support.registry import basic_registry, plain_registry, token_registry``.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.tokens import Issuer

USER, PASSWORD = "device", "correct horse battery staple"
BUILDER_TOKEN = "the-builders-secret"
_HTPASSWD = "device:$2b$05$RZysJNUWLB8CFKghJ/88Nuie5O8o0lXIzJYXt7gX5g52aVRlRF2vS\n"
"""bcrypt of PASSWORD, as ``htpasswd -B`` writes it."""
_LISTENING = re.compile(rb"listening on [0-9.]+:([0-9]+)")
_STOP_SECONDS = 30.0


@dataclass
class TokenRequest:
    """One request to the token server."""

    user: str
    service: str | None
    scopes: list[str]


@dataclass
class TokenServer:
    """Grants ``repository:<name>:pull,push`` to the builder for everything, and to other users
    their entry in ``pulls``. ``requests`` are the received ones. ``lifetime`` is the value of
    ``expires_in``, unless None; tokens themselves last for hours.
    ``builder_actions``: what the builder may do everywhere.
    """

    issuer: Issuer
    url: str
    requests: list[TokenRequest] = field(default_factory=list)
    pulls: dict[str, set[str]] = field(default_factory=dict)
    lifetime: int | None = 300
    builder_actions: set[str] = field(default_factory=lambda: {"pull", "push"})

    def answer(self, authorization: str | None, query: str) -> tuple[int, dict[str, Any]]:
        """Returns status and body for one request."""
        user, password = _basic(authorization)
        parameters = parse_qs(query)
        scopes = parameters.get("scope", [])
        self.requests.append(TokenRequest(user, (parameters.get("service") or [None])[0], scopes))  # type: ignore[list-item]
        if user and (user, password) not in (("builder", BUILDER_TOKEN), (USER, PASSWORD)):
            return 401, {"message": "Unauthorized"}
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = (
                self.builder_actions
                if user == "builder"
                else {"pull"}
                if name in self.pulls.get(user, ())
                else set()
            )
            access.append(
                {"type": kind, "name": name, "actions": sorted(allowed & set(actions.split(",")))}
            )
        body: dict[str, Any] = {"token": self.issuer.token(access, subject=user)}
        if self.lifetime is not None:
            body["expires_in"] = self.lifetime
        return 200, body

    def push_authorization(self, *repositories: str) -> str:
        """Returns a header that allows a push there."""
        access = [
            {"type": "repository", "name": name, "actions": ["pull", "push"]}
            for name in repositories
        ]
        return f"Bearer {self.issuer.token(access)}"


@dataclass(frozen=True)
class RunningRegistry:
    """``url`` has no path. ``authorization`` allows pushes; with token authentication ``tokens``
    gives it.
    """

    url: str
    process: subprocess.Popen[bytes]
    authorization: str | None = None
    tokens: TokenServer | None = None

    @property
    def host(self) -> str:
        """Returns host and port as in image names."""
        return urlsplit(self.url).netloc


@contextmanager
def running_registry(
    root: Path,
    *,
    auth: Mapping[str, Any] | None = None,
    certificate: tuple[Path, Path] | None = None,
    authorization: str | None = None,
    tokens: TokenServer | None = None,
    port: int = 0,
    readonly: bool = False,
    address: str = "127.0.0.1",
) -> Iterator[RunningRegistry]:
    """Runs a registry with its data under ``root``; with ``readonly`` it refuses pushes. ``port``:
    a free one unless given. ``certificate``: paths of certificate and key; the URL is then
    ``https://localhost:…``.
    """
    root.mkdir(parents=True, exist_ok=True)
    config = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(root / "data")},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": False}, "readonly": {"enabled": readonly}},
        },
        "http": {"addr": f"{address}:{port}"},
        **({"auth": dict(auth)} if auth else {}),
    }
    if certificate is not None:
        config["http"]["tls"] = {"certificate": str(certificate[0]), "key": str(certificate[1])}  # type: ignore[index]
    (root / "registry.yml").write_text(json.dumps(config))  # JSON is YAML
    # It ends with this process, however that ends.
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "docker-registry",
        "serve",
        str(root / "registry.yml"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        try:
            port = _port(process.stderr)
            # Its output is read on: a full pipe would stop it.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            url = f"http://{address}:{port}" if certificate is None else f"https://localhost:{port}"
            yield RunningRegistry(url, process, authorization, tokens)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def running_basic_registry(root: Path) -> Iterator[RunningRegistry]:
    """Runs one with htpasswd: USER and PASSWORD."""
    root.mkdir(parents=True, exist_ok=True)
    passwords = root / "htpasswd"
    passwords.write_text(_HTPASSWD)
    authorization = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    auth = {"htpasswd": {"realm": "the test, realm", "path": str(passwords)}}
    with running_registry(root, auth=auth, authorization=authorization) as registry:
        yield registry


@contextmanager
def running_token_registry(root: Path, issuer: Issuer | None = None) -> Iterator[RunningRegistry]:
    """Runs one with token authentication; its ``tokens`` is the running token server."""
    root.mkdir(parents=True, exist_ok=True)
    with running_token_server(issuer or Issuer()) as tokens:
        bundle = root / "issuer.pem"
        bundle.write_bytes(tokens.issuer.certificate)
        auth = {
            "token": {
                "realm": tokens.url,
                "service": tokens.issuer.audience,
                "issuer": tokens.issuer.issuer,
                "rootcertbundle": str(bundle),
            }
        }
        with running_registry(root, auth=auth, tokens=tokens) as registry:
            yield registry


@contextmanager
def running_token_server(issuer: Issuer) -> Iterator[TokenServer]:
    """Runs the double of open-balena-api's token endpoint in a separate thread."""

    class TokenEndpoint(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = tokens.answer(self.headers["authorization"], urlsplit(self.path).query)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing, so that pytest's output stays readable."""

    with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as server:
        tokens = TokenServer(issuer, f"http://127.0.0.1:{server.server_address[1]}/auth/v1/token")
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        try:
            yield tokens
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def plain_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """Yields one open registry for all tests that import this; each uses its own repositories."""
    with running_registry(tmp_path_factory.mktemp("plain-registry")) as registry:
        yield registry


@pytest.fixture(scope="session")
def basic_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """Yields one with htpasswd."""
    with running_basic_registry(tmp_path_factory.mktemp("basic-registry")) as registry:
        yield registry


@pytest.fixture(scope="session")
def token_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """Yields one with token authentication."""
    with running_token_registry(tmp_path_factory.mktemp("token-registry")) as registry:
        yield registry


def _basic(authorization: str | None) -> tuple[str, str]:
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    user, _, password = base64.b64decode(rest).decode().partition(":")
    return user, password


def _port(log: IO[bytes]) -> int:
    lines = b""
    for line in log:
        lines += line
        if found := _LISTENING.search(line):
            return int(found[1])
    raise RuntimeError(f"docker-registry did not start: {lines[-2000:].decode('utf-8', 'replace')}")
