"""``shared``: two real servers, one redis-server, one docker-registry with tokens. Cuts are in
test_replicas_cut.py.
"""

from __future__ import annotations

import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from obdelta.device.update import Update
from tests.support.images import TARGET_REPOSITORY
from tests.support.processes import until
from tests.support.redis import RunningRedis
from tests.support.server import RunningServer, running_server
from tests.support.shared_servers import PASSWORD, Start, update
from tests.support.stack import Stack


def builds(*servers: RunningServer) -> list[str]:
    """Returns the results of builds of all servers, without those of the zstd form."""
    return [
        outcome
        for server in servers
        for outcome in re.findall(r"build: pair=(?!.* form=zstd).* outcome=(\w+)", server.log)
    ]


def ready(server: RunningServer) -> str:
    with urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("publish", ["serve", "registry"])
def test_one_replica_builds_and_both_serve(
    stack: Stack, replica: Start, publish: str, tmp_path: Path
) -> None:
    one, other = replica("one", publish=publish), replica("other", publish=publish)
    begin = threading.Barrier(6)

    def device(number: int) -> Update:
        requested, pulled = ((one, other), (other, one))[number % 2]
        begin.wait(30)
        return update(
            stack,
            requested,
            pulled.url if publish == "serve" else None,
            tmp_path / f"device-{number}",
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
    assert PASSWORD not in one.log + other.log
    # A later replica with an empty state finds it there.
    late = replica("late", publish=publish)
    assert (
        update(stack, late, late.url if publish == "serve" else None, tmp_path / "late").name
        == name
    )
    assert builds(late) == []


def test_all_replicas_share_a_verdict(stack: Stack, replica: Start) -> None:
    options = {"max_delta_ratio": "0", "device_link": "metered"}
    one, other = replica("one", **options), replica("other", **options)
    for server in (one, other):
        assert stack.name(server) == stack.names()[1]
    assert all(
        "category=not-worth" in server.log and "the delta is too large: it has" in server.log
        for server in (one, other)
    )
    assert "another replica builds" not in other.log and not list(
        (other.state_dir / "layers").iterdir()
    )


def test_without_redis_each_replica_works_alone(
    stack: Stack, replica: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    redis.stop()
    one = replica("one")
    assert update(stack, one, one.url, tmp_path / "first").is_delta
    assert builds(one) == ["ready"]
    until("it reports that it works alone", lambda: ": this replica works alone" in ready(one))
    assert ready(one).startswith("ready")
    (problem,) = one.attention
    assert problem.startswith("shared: Redis at ") and problem.endswith("this replica works alone")
    redis.start()
    until("it is back", lambda: "answers" in ready(one))
    assert one.attention == []
    # A delta that was pushed meanwhile is still found: the registry has it.
    other = replica("other")
    assert update(stack, other, other.url, tmp_path / "second").is_delta
    assert builds(other) == []


@pytest.mark.parametrize(
    ("shared", "upstream", "expected"),
    [
        (
            "redis://h:6379/x",
            "http://127.0.0.1:9",
            "setting shared has the value '.*': expected the URL of a Redis",
        ),
        ("redis://127.0.0.1:9", "oci:/nowhere", "expected no value, where the upstream is oci:DIR"),
        ("redis://127.0.0.1:9", "http://127.0.0.1:9", "setting builder-token is missing"),
    ],
)
def test_invalid_settings_of_replicas_are_refused(
    shared: str, upstream: str, expected: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(AssertionError, match=expected),
        running_server(
            tmp_path / "state", upstream=upstream, environment={"OBDELTA_SHARED": shared}
        ),
    ):
        pass
