"""Servers whose registry wants openBalena's tokens, and devices before them."""

from __future__ import annotations

import http.client
import json
import random
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest

from bench.images import Image, file, make_image, make_layer, push
from obdelta.device.http import Http
from obdelta.oci import Reference
from obdelta.oci.manifest import ACCEPT
from tests.support.behind_haproxy import Device as TlsDevice
from tests.support.behind_haproxy import Keys, proxied
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.registry import BUILDER_TOKEN, RunningRegistry, running_token_registry
from tests.support.server import RunningServer, free_port, running_server
from tests.support.tokens import AUDIENCE, Issuer, node_tokens, pulls

DEVICE = "127.0.0.77"
"""The address from which devices of these tests connect; haproxy itself connects from 127.0.0.1."""
NAME = "localhost"
"""The server's name for devices: every client resolves it, and verifies the certificate for it."""
BIG_REPOSITORY = "v2/" + "c3" * 16
BIG = 24 * 1024 * 1024
REALM = "https://api.example.com/auth/v1/token"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class RecordingIssuer(Issuer):
    """Remembers every token that it has signed."""

    def __init__(self) -> None:
        super().__init__("ES256")
        self.signed: list[str] = []

    def sign(self, *arguments: Any, **keywords: Any) -> str:
        self.signed.append(super().sign(*arguments, **keywords))
        return self.signed[-1]

    def api_token(
        self, *repositories: str, access: list[dict[str, Any]] | None = None, **more: Any
    ) -> str:
        """Returns a token as open-balena-api signs it, with npm's jsonwebtoken."""
        (token,) = node_tokens(
            [self.node_job(pulls(*repositories) if access is None else access, **more)]
        )
        self.signed.append(token)
        return token


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class DeviceHttp(Http):
    """Connects from :data:`DEVICE`."""

    def _connection(self, scheme: str, host: str, timeout: float) -> http.client.HTTPConnection:
        assert scheme == "https" and self.tls is not None
        return http.client.HTTPSConnection(
            host, timeout=timeout, context=self.tls, source_address=(DEVICE, 0)
        )


@dataclass
class Front:
    """The whole installation, as devices see it: ``host`` is haproxy's port. ``answers`` is every
    error body it answered.
    """

    server: RunningServer
    keys: Keys
    port: int
    issuer: RecordingIssuer
    answers: list[bytes] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"{NAME}:{self.port}"

    @property
    def url(self) -> str:
        return f"https://{self.host}"

    def http(self) -> Http:
        return DeviceHttp(timeout=60, tls=ssl.create_default_context(cafile=str(self.keys.ca)))

    def get(
        self,
        path: str,
        token: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        *,
        method: str = "GET",
    ) -> Answer:
        own = {"Authorization": f"Bearer {token}"} if token is not None else {}
        accept = {"Accept": ", ".join(ACCEPT)}
        with self.http().request(method, self.url + path, {**accept, **own, **headers}) as answer:
            body = b"" if method == "HEAD" else b"".join(answer.chunks())
            if answer.status >= 300:
                self.answers.append(body)
            return Answer(answer.status, answer.headers, body)

    def question(
        self, base: str = BASE_REPOSITORY, target: str = TARGET_REPOSITORY, version: int = 3
    ) -> str:
        return f"/api/v{version}/delta?src={self.host}/{base}&dest={self.host}/{target}&wait=true"

    def delta(self, token: str) -> Reference:
        answer = self.get(self.question(), token)
        assert answer.status == 200, answer.body
        return Reference.parse(json.loads(answer.body)["name"])


@pytest.fixture(scope="module")
def issuer() -> RecordingIssuer:
    return RecordingIssuer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("big")
    layer = make_layer([file("noise", random.Random(1).randbytes(BIG))], folder / "blobs", level=1)
    return make_image([layer], folder / "image")


@pytest.fixture(scope="module")
def registry(
    issuer: RecordingIssuer, pair: Pair, big: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningRegistry]:
    with running_token_registry(tmp_path_factory.mktemp("registry"), issuer) as running:
        assert running.tokens is not None
        images = {BASE_REPOSITORY: pair.base, TARGET_REPOSITORY: pair.target, BIG_REPOSITORY: big}
        for repository, image in images.items():
            authorization = running.tokens.push_authorization(repository)
            push(image, running.url, repository, "latest", authorization=authorization)
        yield running


@pytest.fixture(scope="module", params=["device", "builder"])
def front(
    request: pytest.FixtureRequest,
    issuer: RecordingIssuer,
    registry: RunningRegistry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    keys = Keys(folder)
    keys.issue("delta", NAME)
    keys.issue("haproxy", "*.example.com")
    certificate = issuer.write(folder)
    backend = free_port()
    with ExitStack() as stack:
        rule = ('req_ssl_sni -i -m beg "delta."', f'req_ssl_sni -i -m str "{NAME}"')
        port = stack.enter_context(proxied("pass-through", keys, backend, replace=rule))
        server = stack.enter_context(
            running_server(
                folder / "state",
                upstream=registry.url,
                port=backend,
                environment=(
                    {"OBDELTA_BUILDER_TOKEN": BUILDER_TOKEN} if request.param == "builder" else {}
                ),
                public_url=f"https://{NAME}:{port}",
                upstream_credentials=request.param,
                # No secret is in either.
                log_format="json" if request.param == "builder" else "text",
                auth="token",
                auth_key=str(certificate),
                auth_issuer=issuer.issuer,
                auth_audience=AUDIENCE,
                auth_realm=REALM,
                tls_certificate=str(folder / "delta.pem"),
                proxy_from="proxy-protocol",
                effort="fast",  # the big image is built in two forms while a device waits
            )
        )
        running = Front(server, keys, port, issuer)
        _wait_for_haproxys_check(running)
        yield running


def _wait_for_haproxys_check(front: Front) -> None:
    """Waits for haproxy, which started first and checks the server three times a second."""
    end = time.monotonic() + 60
    while True:
        try:
            TlsDevice(front.port, front.keys, name=NAME).close()
            return
        except (ssl.SSLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="module")
def token(front: Front) -> str:
    """Returns a device's token: pull on both images."""
    return front.issuer.api_token(BASE_REPOSITORY, TARGET_REPOSITORY)
