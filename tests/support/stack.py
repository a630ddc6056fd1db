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

from bench.images import push
from obdelta.device import Device, Engine, Http, Update
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.registry import BUILDER_TOKEN, RunningRegistry, running_token_registry
from tests.support.server import RunningServer, running_server
from tests.support.tokens import Issuer, pulls


@dataclass
class Stack:
    """``certificate`` is the API's, as it lies on the shared volume; ``pair``
    is in the registry.
    """

    root: Path
    pair: Pair
    issuer: Issuer
    certificate: Path
    registry: RunningRegistry

    def token(self, *repositories: str) -> str:
        """A device's, to pull the pair (or other repositories)."""
        return self.issuer.token(pulls(*(repositories or (BASE_REPOSITORY, TARGET_REPOSITORY))))

    def push_authorization(self, *repositories: str) -> str:
        """A header that may push there."""
        assert self.registry.tokens is not None
        return self.registry.tokens.push_authorization(*repositories)

    @contextmanager
    def server(
        self,
        state: str = "state",
        *,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        **options: str,
    ) -> Iterator[RunningServer]:
        """Before the registry, with the builder's token, asking for tokens."""
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
            self.root / state, upstream=self.registry.url, port=port, environment=secrets, **given
        ) as server:
            yield server

    def names(
        self, base: str = BASE_REPOSITORY, target: str = TARGET_REPOSITORY
    ) -> tuple[str, str]:
        """As devices know the two images."""
        return f"{self.registry.host}/{base}", f"{self.registry.host}/{target}"

    def device(self, server: RunningServer, *repositories: str) -> Device:
        """It pulls each image from the host in its name."""
        token, http = self.token(*repositories), Http(timeout=60)
        return Device(http, Engine(http, token=token), server.url, token=token)

    def update(
        self,
        server: RunningServer,
        work: Path,
        base: str = BASE_REPOSITORY,
        target: str = TARGET_REPOSITORY,
    ) -> Update:
        """Base pulled from the registry, delta asked for, pulled from where it says, applied and
        verified.
        """
        work.mkdir()
        device = self.device(server, base, target)
        source, wanted = self.names(base, target)
        return device.update(device.load_base(Reference.parse(source), work), source, wanted, work)

    def ask(
        self,
        server: RunningServer,
        extra: str = "&wait=true",
        version: int = 3,
        base: str = BASE_REPOSITORY,
        target: str = TARGET_REPOSITORY,
    ) -> tuple[int, dict[str, str], bytes]:
        """The bare answer for a pair, redirects not followed."""
        source, wanted = self.names(base, target)
        url = f"{server.url}/api/v{version}/delta?src={source}&dest={wanted}{extra}"
        with Http(timeout=120).ask(
            "GET", url, {"Authorization": f"Bearer {self.token(base, target)}"}
        ) as answer:
            return answer.status, dict(answer.headers), b"".join(answer.chunks())

    def name(self, server: RunningServer) -> str:
        """The name that the v3 answer gives."""
        status, _, body = self.ask(server)
        assert status == 200, body
        return str(json.loads(body)["name"])


@contextmanager
def running_stack(root: Path, pair: Pair) -> Iterator[Stack]:
    """With ``pair`` pushed."""
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
