"""The builder with a balena-engine (a double): hostile output, outages and leftovers."""

from __future__ import annotations

import io
import json
import ssl
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted

from bench.images import push
from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.engine.api import EngineApi, TlsFiles
from obdelta.builds.engine.fallback import FallbackBuilder
from obdelta.builds.engine.saved_image import Watch, unpack
from obdelta.device.http import Http
from obdelta.errors import (
    BaseUnusable,
    Denied,
    EngineFailed,
    EngineUnavailable,
    ObdeltaError,
    ProofFailed,
    WorkerFailed,
)
from obdelta.oci import Digest, Form
from tests.support.engine_double import builders_token, running_engine
from tests.support.engine_images import EngineDouble
from tests.support.engine_stack import BUILDER, pair, reference, stack
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.processes import until
from tests.support.registry import BUILDER_TOKEN
from tests.support.server import RunningServer
from tests.support.stack import Stack
from tests.support.tokens import make_certificate, make_key, private_pem

__all__ = ["pair", "stack"]


@pytest.fixture
def engine(stack: Stack) -> Iterator[EngineDouble]:
    with running_engine(stack.registry.url, builders_token(stack.registry.tokens)) as running:
        yield running


def test_tls_with_both_sides_certificates(stack: Stack, tmp_path: Path) -> None:
    key = make_key("ES256")
    ca = make_certificate(key, "localhost")
    (tmp_path / "ca.pem").write_bytes(ca)
    (tmp_path / "cert.pem").write_bytes(ca)
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with running_engine(stack.registry.url, tls=context) as engine:
        assert EngineApi(engine.url, TlsFiles.of(tmp_path)).version() == "v20.10.44"
        with pytest.raises(EngineUnavailable):
            EngineApi(engine.url).version()
        other = tmp_path / "other"
        other.mkdir()
        stranger = make_key("ES256")
        (other / "ca.pem").write_bytes(make_certificate(stranger, "localhost"))
        for name in ("cert.pem", "key.pem"):
            (other / name).write_bytes((tmp_path / name).read_bytes())
        with pytest.raises(EngineUnavailable):
            EngineApi(engine.url, TlsFiles.of(other)).version()


def test_errors_in_the_middle_of_a_stream_are_errors(
    engine: EngineDouble, stack: Stack, pair: Pair
) -> None:
    api = EngineApi(engine.url)
    names = [
        reference(stack.registry.host, repository, image)
        for repository, image in ((BASE_REPOSITORY, pair.base), (TARGET_REPOSITORY, pair.target))
    ]
    engine.say(
        "pull",
        {
            "errorDetail": {"message": "no space left on device"},
            "error": "no space\nleft on device",
        },
    )
    with pytest.raises(EngineFailed, match=r"^balena-engine: no space left on device$"):
        api.pull(names[0], BUILDER, Watch())
    for name in names:
        api.pull(name, BUILDER, Watch())

    def delta() -> Digest:
        return api.create_delta(
            pair.base.image_id, pair.target.image_id, "obdelta/x:building", Watch()
        )

    engine.say("delta", {"errorDetail": {"message": "layer does not exist"}})
    with pytest.raises(EngineFailed, match="layer does not exist"):
        delta()
    engine.say("delta", {"status": "Delta complete"})
    with pytest.raises(EngineFailed, match="ended without a delta"):
        delta()
    engine.say("delta", {})  # the connection breaks off
    with pytest.raises(EngineFailed, match="broke off"):
        delta()
    assert str(delta()) in engine.images


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "lacks a file"),
        ({"manifest.json": b"[]"}, "no valid manifest.json"),
        ({"manifest.json": b"{"}, "no valid manifest.json"),
        (
            {"manifest.json": b'[{"Config": "c", "Layers": ["../../etc/passwd"]}]', "c": b"{}"},
            "lacks a file",
        ),
        ({"manifest.json": b'[{"Config": "c"}]', "c": b"{}"}, "no valid manifest.json"),
    ],
)
def test_the_output_of_an_engine_is_checked(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in {**members, "../escaped": b"out"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    out.seek(0)
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(EngineFailed, match=message):
        unpack(out, folder / "stem", 1 << 20, Watch())
    assert not (tmp_path / "escaped").exists() and all(
        path.name.startswith("stem-") for path in folder.iterdir()
    )


def served_by(
    stack: Stack, engine: EngineDouble, state: str, builder: str = "balena-engine"
) -> AbstractContextManager[RunningServer]:
    return stack.server(state, builder=builder, docker_host=engine.url, request_timeout="3")


def ready(server: RunningServer) -> tuple[int, str]:
    with Http(timeout=30).request("GET", f"{server.operator_url}/readyz") as answer:
        return answer.status, answer.small(1000).decode()


def test_a_wrong_delta_of_the_engine_is_never_served(
    engine: EngineDouble, stack: Stack, tmp_path: Path
) -> None:
    engine.flip = True
    with served_by(stack, engine, "wrong") as server:
        update = stack.update(server, tmp_path / "full")
        assert not update.is_delta and update.image_id == stack.pair.target.image_id
        assert "failed its proof" in server.log and engine.images == []


def test_a_layer_of_another_repository_is_not_read_from_the_engine(
    engine: EngineDouble, stack: Stack, pair: Pair
) -> None:
    """Registries accept a manifest that names a foreign digest with a URL beside it, and engines
    pull no layer that they have.
    """
    value = json.loads(pair.target.manifest)
    value["layers"][2]["urls"] = ["http://example.com/"]
    layers = (*pair.target.layers[:2], *pair.target.layers[3:])
    other_target = replace(pair.target, manifest=json.dumps(value).encode(), layers=layers)
    repository = f"v2/{'e' * 32}"
    push(
        other_target,
        stack.registry.url,
        repository,
        "latest",
        authorization=stack.push_authorization(repository),
    )
    with served_by(stack, engine, "strange") as server:
        status, _, body = stack.ask(server, target=repository)
        assert (status, json.loads(body)["name"]) == (200, stack.names(target=repository)[1])
        assert "category=layer-gone" in server.log


@pytest.mark.parametrize(
    ("error", "passed_on"),
    [
        (EngineUnavailable("x"), True),
        (EngineFailed("x"), True),
        (ProofFailed("layer", "x"), True),
        (WorkerFailed("x"), True),
        (DeltaTooLarge(1, 1), False),
        (BaseUnusable("x"), False),
        (Denied("x"), False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_when_the_next_builder_is_tried(error: ObdeltaError, passed_on: bool) -> None:
    class Builds:
        kind, recipe, forms = "v3", 1, (Form.GZIP,)

        def __init__(self, outcome: object) -> None:
            self.outcome = outcome

        async def build(self, *_: object, low_memory: bool) -> object:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

    made = object()
    both = FallbackBuilder(cast(Any, [Builds(error), Builds(made)]))
    arguments: Any = (None, None, None, None)
    if passed_on:
        assert await both.build(*arguments) is made
    else:
        with pytest.raises(type(error)):
            await both.build(*arguments)
    with pytest.raises(type(error)):
        await FallbackBuilder(cast(Any, [Builds(EngineFailed("y")), Builds(error)])).build(
            *arguments
        )


def test_while_the_engine_is_away_devices_get_a_retry_answer(stack: Stack, tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/nothing"
    with stack.server(
        "away", builder="balena-engine", docker_host=nowhere, request_timeout="1"
    ) as server:
        for _ in range(4):  # more often than failures that lead to a full pull
            assert stack.ask(server)[0] == 504
        status, message = ready(server)
        assert status == 503 and "the balena-engine is unavailable" in message
    with stack.server(
        "away-then-native", builder="balena-engine native", docker_host=nowhere
    ) as server:
        assert ready(server)[0] == 200
        assert stack.update(server, tmp_path / "work").is_delta


def test_leftovers_on_an_engine_that_died_are_removed_later(
    engine: EngineDouble, stack: Stack, tmp_path: Path
) -> None:
    engine.dies = True
    state = tmp_path / "state"
    with served_by(stack, engine, str(state)) as server:
        engine.say("delta", {})
        assert stack.ask(server)[0] == 504 and engine.dead and len(engine.images) == 2
        engine.dead = False
        assert stack.ask(server)[0] == 200
        assert engine.images == []
        # The opposite direction; this time the server is killed too.
        engine.say("delta", {})
        assert stack.ask(server, base=TARGET_REPOSITORY, target=BASE_REPOSITORY)[0] == 504
        assert len(engine.images) == 2
        server.process.kill()
    engine.dead = False
    with served_by(stack, engine, str(state)):
        until("the engine has nothing", lambda: not engine.images)


def test_existing_images_of_an_engine_are_used_and_stay(
    engine: EngineDouble, stack: Stack, pair: Pair, tmp_path: Path
) -> None:
    own = engine.pull(
        str(reference(stack.registry.host, BASE_REPOSITORY, pair.base)),
        {"username": "builder", "password": BUILDER_TOKEN},
    )
    engine.pulls.clear()
    with served_by(stack, engine, "own") as server:
        assert stack.update(server, tmp_path / "work").is_delta
        assert len(engine.pulls) == 1 and engine.images == [own.id]


def test_builds_that_share_an_image_pull_it_once_and_the_last_removes_it(
    engine: EngineDouble, stack: Stack
) -> None:
    device = stack.server(
        "shared", builder="balena-engine", docker_host=engine.url, upstream_credentials="device"
    )
    with device as server, ThreadPoolExecutor(2) as both:
        pairs = [(BASE_REPOSITORY, TARGET_REPOSITORY), (TARGET_REPOSITORY, BASE_REPOSITORY)]

        def ask(names: tuple[str, str]) -> int:
            status, _, body = stack.ask(server, base=names[0], target=names[1])
            assert "delta-" in json.loads(body)["name"]
            return status

        assert list(both.map(ask, pairs)) == [200, 200]
        assert engine.images == [] and len(engine.pulls) in (2, 3, 4)
        assert {tuple(pull) for pull in engine.pulls} == {("registrytoken",)}
        assert not any(pull["registrytoken"] in server.log for pull in engine.pulls)
