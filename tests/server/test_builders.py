"""Builders: valid tokens that grant nothing, as open-balena-api gives them to open-balena-builder.

The real server and Debian's docker-registry with token authentication; the API that signs is a
double.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obdelta.device.http import Http
from obdelta.oci import Reference
from tests.support.fault_fleet import builds
from tests.support.held_rsync import HeldRsync
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack
from tests.support.tokens import Issuer, pulls

ABSENT = "v2/" + "0" * 32
NOTHING: list[Any] = [
    [],
    # The scope of a builder's token request has the registry's host in it; an entry without
    # actions grants nothing.
    [{"type": "repository", "name": f"registry2.example.com/{TARGET_REPOSITORY}", "actions": []}],
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), pair) as running:
        yield running


def get(server: RunningServer, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
    with Http(timeout=120).request(
        "GET", server.url + path, {"Authorization": f"Bearer {token}"}
    ) as answer:
        return answer.status, dict(answer.headers), b"".join(answer.chunks())


def question(
    stack: Stack,
    base: str = BASE_REPOSITORY,
    target: str = TARGET_REPOSITORY,
    version: int = 3,
    wait: str = "true",
) -> str:
    src, dest = stack.names(base, target)
    return f"/api/v{version}/delta?src={src}&dest={dest}" + (f"&wait={wait}" if wait else "")


def own_name(stack: Stack, target: str = TARGET_REPOSITORY) -> bytes:
    return json.dumps({"name": stack.names(target=target)[1]}).encode()


@pytest.mark.parametrize("access", NOTHING)
def test_a_builder_gets_the_delta_built_and_devices_find_it_ready(
    stack: Stack, tmp_path: Path, access: list[Any]
) -> None:
    builder = stack.issuer.token(access, subject="builder")
    with stack.server(f"push-{len(access)}") as server:
        status, _, body = get(server, question(stack), builder)
        name = Reference.parse(json.loads(body)["name"])
        assert (status, name.repository, str(name.tag)[:6]) == (200, TARGET_REPOSITORY, "delta-")
        # The token cannot fetch the delta that was prepared for it.
        config = stack.device(server).engine.pull(name).manifest.config.digest
        for path in (f"manifests/{name.tag}", f"blobs/{config}", "manifests/latest"):
            assert get(server, f"/v2/{name.repository}/{path}", builder)[0] == 403
        before = server.log.count("form=gzip outcome=ready")
        assert stack.update(server, tmp_path / "device").is_delta
        assert server.log.count("form=gzip outcome=ready") == before == 1


def test_a_batch_is_prepared_and_its_url_is_not_given_away(stack: Stack) -> None:
    builder = stack.issuer.token([])
    with stack.server("batch", v2_full_pull="no") as server:
        for _ in range(2):
            status, headers, _ = get(server, question(stack, version=2), builder)
            assert (status, headers["location"].partition("?")[2]) == (300, "full-pull=yes")
        status, headers, _ = stack.ask(server, "", version=2)
        assert status == 300 and "signature=" in headers["location"]
        assert server.log.count("outcome=ready") == 1


def test_an_image_that_does_not_exist_looks_like_one_that_needs_no_delta(stack: Stack) -> None:
    builder = stack.issuer.token([])

    def answered(
        server: RunningServer, base: str, target: str, version: int
    ) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = get(server, question(stack, base, target, version), builder)
        kept = {
            name: value
            for name, value in headers.items()
            if name not in ("date", "x-request-id", "content-length")
        }
        return status, kept, body.replace(target.encode(), b"TARGET")

    with (
        stack.server("exists") as server,
        stack.server("refused", environment={"TOKEN_AUTH_BUILDER_TOKEN": "x"}) as no,
    ):
        for version in (2, 3):
            needs_none = answered(server, TARGET_REPOSITORY, TARGET_REPOSITORY, version)
            assert needs_none[0] == (200 if version == 3 else 300)
            for base, target in (
                (BASE_REPOSITORY, ABSENT),
                (ABSENT, TARGET_REPOSITORY),
                (ABSENT, ABSENT),
            ):
                assert answered(server, base, target, version) == needs_none
            refused = answered(no, BASE_REPOSITORY, TARGET_REPOSITORY, version)
            assert (refused[0], refused[2]) == (needs_none[0], needs_none[2])
        assert "category=no-access" in no.log


def test_clients_without_the_builder_token_need_access_as_before(stack: Stack) -> None:
    with stack.server("devices") as server:
        for wait in ("", "false", "1"):
            assert get(server, question(stack, wait=wait), stack.issuer.token([]))[0] == 403
        for access in (pulls(BASE_REPOSITORY), pulls(ABSENT), pulls(TARGET_REPOSITORY)):
            assert get(server, question(stack), stack.issuer.token(access))[0] == 403
        for token in (
            Issuer().token([]),
            stack.issuer.token([], exp=1_000_000_000),
            stack.issuer.token([], aud="another.example.com"),
            stack.issuer.token([], iss="another"),
            "nonsense",
        ):
            assert get(server, question(stack), token)[0] == 401
        for bad in (
            "/api/v3/delta?src=&dest=&wait=true",
            "/api/v3/delta?src=x.example/a&dest=x.example/b&wait=true",
        ):
            assert get(server, bad, stack.issuer.token([]))[0] == 400


@pytest.mark.parametrize(("token", "prepared"), [("", False), (None, True)])
def test_without_credentials_of_its_own_the_server_says_what_to_set(
    stack: Stack, token: str | None, prepared: bool
) -> None:
    environment = {} if token is None else {"TOKEN_AUTH_BUILDER_TOKEN": token}
    with stack.server(
        f"own-{prepared}", upstream_credentials="device", environment=environment
    ) as server:
        for _ in range(2):
            status, _, body = get(server, question(stack), stack.issuer.token([]))
            assert status == 200
            assert (body == own_name(stack)) != prepared
        assert server.log.count("set builder-token") == (0 if prepared else 1)


def test_a_builder_over_its_limit_of_requests_does_not_wait(stack: Stack, tmp_path: Path) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    builder = stack.issuer.token([])
    with (
        stack.server(
            "limit", environment=rsync.environment, max_builder_requests="1", v2_streaming="never"
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(get, server, question(stack, version=2), builder)
        until(
            "it is being built",
            lambda: [build["state"] for build in builds(server.operator_url)] == ["running"],
        )
        assert get(server, question(stack), builder)[::2] == (200, own_name(stack))
        # Clients with access do not count towards this limit.
        assert json.loads(stack.ask(server)[2])["name"] != json.loads(own_name(stack))["name"]
        rsync.go_on()
        assert first.result()[0] == 300
        assert get(server, question(stack), builder)[2] != own_name(stack)
