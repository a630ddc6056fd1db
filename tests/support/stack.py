"""openBalena around the server, as devices see it: the registry and its token server, one key, and
devices that hold tokens.

with running_stack(root, pair) as stack, stack.server(publish="registry") as server:
    stack.update(server, work)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.images import push
from obdelta.device.http import Http
from obdelta.device.update import AGENTS as SUPERVISORS
from obdelta.device.update import Device, Update, device_for
from obdelta.oci import Form, Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.registry import BUILDER_TOKEN, RunningRegistry, running_token_registry
from tests.support.server import RunningServer, command, running_server
from tests.support.tokens import Issuer, pulls
from tests.support.workers import worker_command


@dataclass
class Stack:
    """``certificate`` is the API's, as on the shared volume; the registry holds ``pair``."""

    root: Path
    pair: Pair
    issuer: Issuer
    certificate: Path
    registry: RunningRegistry

    def token(self, *repositories: str) -> str:
        """Returns a device's token, to pull the pair (or other repositories)."""
        return self.issuer.token(pulls(*(repositories or (BASE_REPOSITORY, TARGET_REPOSITORY))))

    def push_authorization(self, *repositories: str) -> str:
        """Returns a header that allows a push there."""
        assert self.registry.tokens is not None
        return self.registry.tokens.push_authorization(*repositories)

    @contextmanager
    def server(
        self,
        state: str = "state",
        *,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        worker: bool = False,
        **options: str,
    ) -> Iterator[RunningServer]:
        """Runs a server for the registry, with the builder's token and token authentication, or a
        worker.
        """
        given: dict[str, Any] = {
            "upstream_credentials": "builder",
            "auth": "token",
            "auth_key": str(self.certificate),
            "auth_issuer": self.issuer.issuer,
            "auth_audience": self.issuer.audience,
            "auth_realm": "https://api.example.com/auth/v1/token",
            **options,
        }
        secrets = {"TOKEN_AUTH_BUILDER_TOKEN": BUILDER_TOKEN, **(environment or {})}
        with running_server(
            self.root / state,
            upstream=self.registry.url,
            port=port,
            environment=secrets,
            run=worker_command if worker else command,
            **given,
        ) as server:
            yield server

    def names(
        self, base: str = BASE_REPOSITORY, target: str = TARGET_REPOSITORY
    ) -> tuple[str, str]:
        """Returns the names of the two images for devices."""
        return f"{self.registry.host}/{base}", f"{self.registry.host}/{target}"

    def device(self, server: RunningServer, *repositories: str, form: Form | None = None) -> Device:
        """Returns a device that pulls each image from the host in its name. Its engine reads
        ``form`` at best.
        """
        return device_for(form, server.url, self.token(*repositories), http=Http(timeout=60))

    def update(
        self,
        server: RunningServer,
        work: Path,
        base: str = BASE_REPOSITORY,
        target: str = TARGET_REPOSITORY,
        *,
        form: Form | None = None,
    ) -> Update:
        """Pulls the base from the registry, requests the delta, pulls it from the host in the
        answer, applies and verifies it.
        """
        work.mkdir()
        device = self.device(server, base, target, form=form)
        source, wanted = self.names(base, target)
        return device.update(device.load_base(Reference.parse(source), work), source, wanted, work)

    def ask(
        self,
        server: RunningServer,
        extra: str = "&wait=true",
        version: int = 3,
        base: str = BASE_REPOSITORY,
        target: str = TARGET_REPOSITORY,
        form: Form | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns the answer for a pair to a supervisor whose engine reads ``form``; redirects are
        not followed.
        """
        source, wanted = self.names(base, target)
        url = f"{server.url}/api/v{version}/delta?src={source}&dest={wanted}{extra}"
        http = Http(timeout=120) if form is None else Http(SUPERVISORS[form], timeout=120)
        with http.request(
            "GET", url, {"Authorization": f"Bearer {self.token(base, target)}"}
        ) as answer:
            return answer.status, dict(answer.headers), b"".join(answer.chunks())

    def name(self, server: RunningServer, form: Form | None = None) -> str:
        """Returns the name in the v3 answer."""
        status, _, body = self.ask(server, form=form)
        assert status == 200, body
        return str(json.loads(body)["name"])


@contextmanager
def running_stack(root: Path, pair: Pair) -> Iterator[Stack]:
    """Runs a stack whose registry holds ``pair``."""
    root.mkdir(parents=True, exist_ok=True)
    issuer = Issuer()
    certificate = issuer.write(root)
    with running_token_registry(root / "registry", issuer) as registry:
        stack = Stack(root, pair, issuer, certificate, registry)
        for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY)):
            push(
                image,
                registry.url,
                repository,
                "latest",
                authorization=stack.push_authorization(repository),
            )
        yield stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Yields a stack of small images for the tests of a module that imports this."""
    pair = make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)
    with running_stack(tmp_path_factory.mktemp("stack"), pair) as running:
        yield running
