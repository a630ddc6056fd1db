"""The same devices, whatever ``publish`` and ``builder`` are: the real server, a real registry with
token authentication, the device of ``obdelta check``. The engine of ``builder = balena-engine`` is
a double (``tests/support/engine_double.py``).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from obdelta.delta.layer_copy import layer_copies
from obdelta.device import Engine, Http
from obdelta.oci import Reference, common_prefix
from tests.support.engine_double import EngineDouble, builders_token, running_engine
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack

COMBINATIONS = list(itertools.product(("serve", "registry"), ("native", "balena-engine")))


@dataclass
class Installation:
    """One of the four, up and running."""

    publish: str
    builder: str
    stack: Stack
    engine: EngineDouble
    server: RunningServer

    @property
    def host(self) -> str:
        """Where devices are led to."""
        return self.server.host if self.publish == "serve" else self.stack.registry.host


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda both: "-".join(both))
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    publish, builder = request.param
    root = tmp_path_factory.mktemp("blackbox")
    with (
        running_stack(root / "stack", make_pair(root / "pair")) as stack,
        running_engine(stack.registry.url, builders_token(stack.registry.tokens)) as engine,
        stack.server(publish=publish, builder=builder, docker_host=engine.url) as server,
    ):
        yield Installation(publish, builder, stack, engine, server)


def test_a_device_updates(installation: Installation, tmp_path: Path) -> None:
    stack, server = installation.stack, installation.server
    update = stack.update(server, tmp_path / "work")
    assert update.is_delta and update.image_id == stack.pair.target.image_id and update.saving > 0.5
    name = Reference.parse(update.name)
    assert (name.host, name.repository) == (installation.host, TARGET_REPOSITORY)
    assert name.tag is not None and name.tag.startswith("delta-")
    if installation.builder == "balena-engine":
        assert "POST /v1.35/images/delta" in installation.engine.requests
        assert {pull["username"] for pull in installation.engine.pulls} == {"builder"}
        # It was pulled for the build alone.
        assert installation.engine.images == []
    else:
        assert installation.engine.requests == []


def test_shared_layers_are_copies_whoever_built_the_delta(installation: Installation) -> None:
    """A host-OS update applies them out of another store; an empty layer, as balena-engine makes
    it, fails there.
    """
    stack = installation.stack
    name = Reference.parse(stack.name(installation.server))
    image = Engine(Http(), stack.token(), registry=f"http://{name.host}").pull(name)
    base, target = stack.pair.base, stack.pair.target
    (copy,) = layer_copies([(base.diff_ids[0], base.layers[0].tar_size)])
    assert common_prefix(base.diff_ids, target.diff_ids) == 1
    assert (image.manifest.layers[0].digest, image.config.diff_ids[0]) == (
        copy.layer.digest,
        copy.layer.diff_id,
    )


def test_the_second_device_gets_the_same_at_once(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    names = {stack.name(server) for _ in range(3)}
    assert len(names) == 1 and server.log.count("outcome=ready") == 1


def test_back_to_the_release_before(installation: Installation, tmp_path: Path) -> None:
    update = installation.stack.update(
        installation.server, tmp_path / "work", TARGET_REPOSITORY, BASE_REPOSITORY
    )
    assert update.is_delta and update.image_id == installation.stack.pair.base.image_id


def test_the_answer_is_what_supervisors_parse(installation: Installation) -> None:
    for wait in ("", "&wait=true"):
        status, headers, body = installation.stack.ask(installation.server, wait)
        assert status == 200 and headers["content-length"] == str(len(body))
        assert list(json.loads(body)) == ["name"]


def test_a_device_with_v2(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    status, headers, _ = stack.ask(server, version=2)
    assert status == 300 and headers["location"].startswith(f"{server.url}/api/v2/delta/download?")
    # Without a token, as supervisors download.
    with Http(timeout=60).ask("GET", headers["location"]) as answer:
        assert answer.status == 200
        content = b"".join(answer.chunks())
    assert json.loads(content[: content.index(0)])["version"] == 2


@pytest.mark.parametrize("version", [2, 3])
def test_who_has_no_token_for_both_gets_nothing(version: int, installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    source, target = stack.names()
    url = f"{server.url}/api/v{version}/delta?src={source}&dest={target}"
    for token, wanted in (
        (None, 401),
        ("x.y.z", 401),
        (stack.token(TARGET_REPOSITORY), 403),
        (stack.token(BASE_REPOSITORY), 403),
    ):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with Http(timeout=30).ask("GET", url, headers) as answer:
            assert answer.status == wanted, (token, answer.small(1000))


def test_a_base_that_is_gone_leads_to_a_full_pull(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    gone = "v2/" + "0f" * 16
    source, target = stack.names(gone)
    url = f"{server.url}/api/v3/delta?src={source}&dest={target}"
    headers = {"Authorization": f"Bearer {stack.token(gone, TARGET_REPOSITORY)}"}
    with Http(timeout=30).ask("GET", url, headers) as answer:
        assert answer.status == 200 and json.loads(answer.small(1000)) == {"name": target}


def test_ready(installation: Installation) -> None:
    with Http(timeout=30).ask("GET", f"{installation.server.operator_url}/readyz") as answer:
        assert answer.status == 200


def test_what_operators_see(installation: Installation) -> None:
    installation.stack.name(installation.server)
    with Http(timeout=30).ask("GET", installation.server.operator_url + "/") as answer:
        page = answer.small(1 << 20).decode()
    assert answer.status == 200 and TARGET_REPOSITORY in page
    pages = set(re.findall(r"/pairs/v3/[0-9]+/[0-9a-f]{64}/[0-9a-f]{64}", page))
    assert pages
    for path in pages:
        with Http(timeout=30).ask("GET", installation.server.operator_url + path) as answer:
            assert answer.status == 200, path
