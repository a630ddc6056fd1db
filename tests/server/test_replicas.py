"""``shared``: two real servers, one redis-server, one docker-registry with tokens. Cuts are in
test_replicas_cut.py.
"""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from obdelta.device import Device, Engine, Http, Update
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.processes import until
from tests.support.redis import RunningRedis, running_redis
from tests.support.server import RunningServer, running_server
from tests.support.stack import Stack, running_stack


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(tmp_path / "stack", make_pair(tmp_path / "pair", size=1 << 18)) as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RunningRedis]:
    with running_redis(tmp_path / "redis", "--requirepass", "very-secret") as running:
        yield running


Replica = Callable[..., RunningServer]


@pytest.fixture
def replica(stack: Stack, redis: RunningRedis) -> Iterator[Replica]:
    """Starts one: ``replica("a", publish="registry")``. All tell devices the same name, as behind
    one balancer.
    """
    with ExitStack() as running:

        def start(state: str, **options: Any) -> RunningServer:
            url = redis.url.replace("://", "://:very-secret@")
            environment = {"OBDELTA_SHARED": url}
            return running.enter_context(
                stack.server(
                    state, environment=environment, public_url="http://127.0.0.1:7", **options
                )
            )

        yield start


def update(stack: Stack, asked: RunningServer, pulled: str | None, work: Path) -> Update:
    """A device whose question goes to one server, and whose pulls go elsewhere (None: to whom the
    answer names).
    """
    work.mkdir(parents=True)
    token, http = stack.token(), Http(timeout=60)
    direct = Engine(http, token=token, registry=stack.registry.url)
    source, target = (
        f"{stack.registry.host}/{name}" for name in (BASE_REPOSITORY, TARGET_REPOSITORY)
    )
    base = Device(http, direct, asked.url, token=token).load_base(Reference.parse(source), work)
    device = Device(http, Engine(http, token=token, registry=pulled), asked.url, token=token)
    done = device.update(base, source, target, work)
    assert done.is_delta and done.image_id == stack.pair.target.image_id
    return done


def builds(*servers: RunningServer) -> list[str]:
    """How builds ended, of all servers."""
    return [
        outcome
        for server in servers
        for outcome in re.findall(r"build: pair=.* outcome=(\w+)", server.log)
    ]


def ready(server: RunningServer) -> str:
    with urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("publish", ["serve", "registry"])
def test_one_builds_and_both_serve(
    stack: Stack, replica: Replica, publish: str, tmp_path: Path
) -> None:
    one, other = replica("one", publish=publish), replica("other", publish=publish)
    begin = threading.Barrier(6)

    def device(number: int) -> Update:
        asked, pulled = ((one, other), (other, one))[number % 2]
        begin.wait(30)
        return update(
            stack, asked, pulled.url if publish == "serve" else None, tmp_path / f"device-{number}"
        )

    with ThreadPoolExecutor(6) as pool:
        names = {done.name for done in pool.map(device, range(6))}
    (name,) = names
    host = "127.0.0.1:7" if publish == "serve" else stack.registry.host
    assert name.startswith(f"{host}/{TARGET_REPOSITORY}:delta-")
    assert sorted(builds(one, other)) == ["elsewhere", "ready"]
    assert all(
        "shared: Redis at 127.0.0.1:" in ready(server) and "answers" in ready(server)
        for server in (one, other)
    )
    assert "very-secret" not in one.log + other.log
    # One that comes later, with nothing of its own, finds it there.
    late = replica("late", publish=publish)
    assert (
        update(stack, late, late.url if publish == "serve" else None, tmp_path / "late").name
        == name
    )
    assert builds(late) == []


def test_a_verdict_is_everybodys(stack: Stack, replica: Replica) -> None:
    one, other = replica("one", worth="0"), replica("other", worth="0")
    for server in (one, other):
        assert stack.name(server) == stack.names()[1]
    assert all(
        "category=not-worth" in server.log and "not worth it: the delta has" in server.log
        for server in (one, other)
    )
    assert "another replica builds" not in other.log and not list(
        (other.state_dir / "layers").iterdir()
    )


def test_without_redis_each_goes_on_by_itself(
    stack: Stack, replica: Replica, redis: RunningRedis, tmp_path: Path
) -> None:
    redis.stop()
    one = replica("one")
    assert update(stack, one, one.url, tmp_path / "first").is_delta
    assert builds(one) == ["ready"]
    until("it is told", lambda: "is away, this replica goes on by itself" in ready(one))
    assert ready(one).startswith("ready")
    redis.start()
    until("it is back", lambda: "answers" in ready(one))
    # What was pushed meanwhile is found all the same: the registry has it.
    other = replica("other")
    assert update(stack, other, other.url, tmp_path / "second").is_delta
    assert builds(other) == []


@pytest.mark.parametrize(
    ("shared", "upstream", "said"),
    [
        (
            "redis://h:6379/x",
            "http://127.0.0.1:9",
            "setting shared has the value '.*': expected the URL of a Redis",
        ),
        ("redis://127.0.0.1:9", "oci:/nowhere", "expected a registry, with shared"),
        ("redis://127.0.0.1:9", "http://127.0.0.1:9", "setting builder-token is missing"),
    ],
)
def test_settings_that_cannot_be(shared: str, upstream: str, said: str, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=said),
        running_server(
            tmp_path / "state", upstream=upstream, environment={"OBDELTA_SHARED": shared}
        ),
    ):
        pass
