"""``builder = balena-engine``: calls that a Docker engine has too run on a real ``dockerd``."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.images import push
from obdelta.builds.engine.api import EngineApi
from obdelta.builds.engine.saved_image import Watch
from obdelta.errors import Cancelled, EngineFailed, EngineUnavailable
from obdelta.oci import Digest, Reference, parse_config
from obdelta.registry import Credentials
from tests.support.dockerd import RunningDockerd, dockerd
from tests.support.engine_stack import BUILDER, pair, reference, stack
from tests.support.images import TARGET_REPOSITORY, Pair
from tests.support.registry import PASSWORD, USER, RunningRegistry, basic_registry
from tests.support.stack import Stack

__all__ = ["basic_registry", "dockerd", "pair", "stack"]


def test_a_real_engine_pulls_saves_and_removes_images(
    dockerd: RunningDockerd, stack: Stack, pair: Pair, tmp_path: Path
) -> None:
    api, steps = EngineApi(dockerd.url), list[object]()
    image = pair.target
    assert api.version() and api.image_id(str(image.image_id)) is None
    name = reference(stack.registry.host, TARGET_REPOSITORY, image)
    bearer = Credentials.bearer(stack.token(TARGET_REPOSITORY))
    for credentials in (bearer, BUILDER):
        api.pull(name, credentials, Watch(steps.append))
        assert api.image_id(str(name)) == image.image_id == api.image_id(str(image.image_id))
        saved = api.save(image.image_id, tmp_path / "saved", 1 << 30, Watch())
        assert saved.config == image.config
        diff_ids = parse_config(image.config).diff_ids
        assert [Digest.of(layer.read_bytes()).hex for layer in saved.layers] == [
            diff_id.hex for diff_id in diff_ids
        ]
        api.remove(str(name))
        assert api.image_id(str(image.image_id)) is None
        api.remove(str(name))
    assert steps
    with pytest.raises(EngineFailed, match="more than 1000 bytes"):
        api.pull(name, BUILDER, Watch())
        api.save(image.image_id, tmp_path / "saved", 1000, Watch())
    api.remove(str(name))


def test_refusals_of_a_real_engine_have_clear_errors(
    dockerd: RunningDockerd, basic_registry: RunningRegistry, pair: Pair, tmp_path: Path
) -> None:
    api = EngineApi(dockerd.url)
    push(
        pair.base,
        basic_registry.url,
        "engine/app",
        "latest",
        authorization=basic_registry.authorization,
    )
    name = reference(basic_registry.host, "engine/app", pair.base)
    for refused in (Credentials.anonymous(), Credentials.basic(USER, "wrong")):
        with pytest.raises(EngineFailed, match=r"basic auth|unauthorized"):
            api.pull(name, refused, Watch())
    api.pull(name, Credentials.basic(USER, PASSWORD), Watch())
    api.remove(str(name))
    missing = Reference(basic_registry.host, "engine/app", digest=Digest("0" * 64))
    with pytest.raises(EngineFailed, match="unknown"):
        api.pull(missing, Credentials.basic(USER, PASSWORD), Watch())
    with pytest.raises(EngineFailed, match=r"failed to get digest sha256:0+: open … no such file"):
        api.save(Digest("0" * 64), tmp_path / "saved", 1 << 20, Watch())
    with pytest.raises(EngineFailed, match="it makes no deltas"):
        api.create_delta(Digest("0" * 64), Digest("1" * 64), "obdelta/x:building", Watch())
    stopped = Watch()
    stopped.stop()
    with pytest.raises(Cancelled):
        api.pull(name, Credentials.basic(USER, PASSWORD), stopped)


def test_a_real_engine_keeps_its_images_and_loses_those_pulled_for_a_build(
    dockerd: RunningDockerd, stack: Stack, pair: Pair, tmp_path: Path
) -> None:
    # A real Docker pulls both, and answers that it makes no deltas: the next builder makes it.
    dockerd.load(pair.base, "mine/base:1")
    before = {image.id for image in dockerd.client.images.list(all=True)}
    with stack.server("real", builder="balena-engine, native", docker_host=dockerd.url) as server:
        assert stack.update(server, tmp_path / "work").is_delta
        (fallback,) = [line for line in server.log.splitlines() if "the next builder" in line]
        assert " was not built: balena-engine: it makes no deltas; " in fallback
    assert {image.id for image in dockerd.client.images.list(all=True)} == before
    dockerd.client.images.remove("mine/base:1")


def test_an_unreachable_engine_is_a_transient_error(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/nothing", "tcp://127.0.0.1:9"):
        with pytest.raises(EngineUnavailable):
            EngineApi(url).version()


def test_a_silent_engine_times_out(tmp_path: Path) -> None:
    """The engine accepts every request, and never ends an answer."""
    connections: list[socket.socket] = []

    def answer(listening: socket.socket) -> None:
        while True:
            connection = listening.accept()[0]
            connections.append(connection)
            request = connection.recv(65536)
            if not request:
                return
            if b"/version" not in request:
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{}\r\n\r\n"
                )

    with (
        tempfile.TemporaryDirectory(prefix="silent-") as folder,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        listening.bind(f"{folder}/engine.sock")
        listening.listen()
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        api, some = EngineApi(f"unix://{folder}/engine.sock", idle=1), Digest("0" * 64)
        calls: list[Callable[[], object]] = [
            api.version,
            lambda: api.pull(
                Reference("registry.example.com", "app", digest=some), BUILDER, Watch()
            ),
            lambda: api.create_delta(some, some, "obdelta/x:building", Watch()),
            lambda: api.save(some, tmp_path / "saved", 1 << 20, Watch()),
        ]
        with ThreadPoolExecutor(len(calls)) as together:
            for outcome in [together.submit(call) for call in calls]:
                with pytest.raises(EngineFailed, match="its answer broke off"):
                    outcome.result()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(f"{folder}/engine.sock")
        thread.join()
    for connection in connections:
        connection.close()
