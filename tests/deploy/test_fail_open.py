"""While obdelta is down, the proxy before it tells devices to pull in full.

The proxies are a real haproxy with both overlays, and a real nginx with the snippets of the
Ingress. The real server is stopped, started, and killed during a build.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from bench.images import push
from tests.support import haproxy
from tests.support.behind_haproxy import HOST, Keys
from tests.support.fail_open import (
    BASE,
    REGISTRY,
    TARGET,
    behind,
    front,
    haproxied,
    is_served,
    is_up,
    outcome,
)
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until
from tests.support.registry import running_registry
from tests.support.server import free_port
from tests.unit.concurrency.test_reactor import silent_upstream

KINDS = ("host-routing", "pass-through")
DIGEST = "sha256:" + "0123456789abcdef" * 4
NAMES = [
    TARGET,
    f"{TARGET}:latest",
    f"{TARGET}@{DIGEST}",
    f"{TARGET}:v1.0_A-b@{DIGEST}",
    f"registry.example.com/{TARGET_REPOSITORY}-2@{DIGEST}",
    f"{REGISTRY}:5000/org/app/main",
]
HOSTILE = [
    "",
    "evil.example.org/v2/a",
    f"{REGISTRY}.evil.org/v2/a",
    f"evil{REGISTRY}/v2/a",
    "registry2.example.org/v2/a",
    "registry2.delta.example.com/v2/a",
    "registry3.example.com/v2/a",
    REGISTRY,
    f"{REGISTRY}/",
    f"user@{REGISTRY}/v2/a",
    f"https://{TARGET}",
    f'{TARGET}","x":"y',
    f"{TARGET}%22,%22x%22:%22y",
    f"{TARGET}%0a",
    f"{TARGET}%0d%0aX-Evil:%20yes",
    f"{TARGET}%00",
    f"{TARGET}\\",
    f"{TARGET}%5c",
    f"{TARGET}%u0022",
    f"{TARGET}+x",
    f"{TARGET}%20x",
    f"{TARGET}<script>",
    f"{TARGET}%c3%a9",
    f"{TARGET}%25{{}}",
    f"{TARGET}@sha256:123",
    f"{TARGET}@{DIGEST}0",
    f"{REGISTRY}/V2/UPPER",
]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    made = Keys(tmp_path)
    made.issue("delta", HOST)
    made.issue("haproxy", "*.example.com")
    return made


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pair: Pair = make_pair(tmp_path_factory.mktemp("pair"), size=1 << 18)
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(pair.base, running.url, BASE_REPOSITORY)
        push(pair.target, running.url, TARGET_REPOSITORY)
        yield running.url


@pytest.mark.parametrize("kind", [*KINDS, "nginx"])
def test_devices_pull_in_full_while_it_is_down(
    kind: str, keys: Keys, registry: str, tmp_path: Path
) -> None:
    """obdelta is down before its first start, then up, stopped in order, and up again."""
    port = free_port()
    with front(kind, keys, port) as device:
        until("it is known to be down", lambda: outcome(device) == TARGET)
        for _ in range(2):
            with behind(kind, keys, tmp_path / "state", registry, port):
                until("deltas are served", lambda: is_served(device))
                assert ":delta-" in device.name()
            until("it is known to be down", lambda: outcome(device) == TARGET)


@pytest.mark.parametrize("kind", [*KINDS, "nginx"])
def test_devices_pull_in_full_when_it_dies_in_mid_build(
    kind: str, keys: Keys, tmp_path: Path
) -> None:
    """The request in progress fails in a way that devices retry, or is answered like the next
    ones.
    """
    port = free_port()
    with (
        silent_upstream() as (upstream, requests),
        front(kind, keys, port) as device,
        ThreadPoolExecutor(1) as pool,
        behind(kind, keys, tmp_path / "state", upstream, port, stop_with=signal.SIGKILL) as server,
    ):
        until("it is known to be up", lambda: is_up(device))
        waiting = pool.submit(outcome, device)
        assert requests.acquire(timeout=60)
        server.process.kill()
        assert waiting.result() in (TARGET, 502, 503, 504, "cut")
        until("it is known to be down", lambda: outcome(device) == TARGET)


@pytest.mark.parametrize("kind", [*KINDS, "nginx"])
def test_answers_of_the_proxy_name_only_images_of_the_own_registry(
    kind: str, keys: Keys, tmp_path: Path
) -> None:
    with front(kind, keys, free_port()) as device:
        until("it is known to be down", lambda: device.name() == TARGET)
        for name in NAMES:
            status, body = device.delta(name)
            assert (status, json.loads(body)) == (200, {"name": name})
            if kind != "nginx":  # nginx has no function for it; supervisors send names unescaped
                status, body = device.delta(quote(name, safe=""))
                assert (status, json.loads(body)) == (200, {"name": name})
        named = [name for name in HOSTILE if device.delta(name)[0] == 200]
        assert named == []
        for path, method, host in [
            (f"/api/v3/delta?src={BASE}", "GET", HOST),
            (f"/api/v2/delta?src={BASE}&dest={TARGET}", "GET", HOST),
            (f"/api/v3/delta/?src={BASE}&dest={TARGET}", "GET", HOST),
            (f"/api/v3/delta?src={BASE}&dest={TARGET}", "POST", HOST),
            (f"/api/v3/delta?src={BASE}&dest={TARGET}", "GET", "delta.example.org"),
            ("/v2/", "GET", HOST),
            ("/", "GET", HOST),
        ]:
            if kind == "nginx" and host != HOST:
                continue  # the only server of this nginx accepts every name
            assert device.ask(path, method=method, host=host)[0] == 503, (path, method, host)
        assert (
            device.ask(f"/api/v3/delta?src={BASE}&dest={TARGET}", host=f"Delta.Example.com:{443}")[
                0
            ]
            == 200
        )


@pytest.mark.parametrize("kind", [*KINDS, "nginx"])
def test_answers_of_the_server_pass_while_it_is_up(kind: str, keys: Keys, tmp_path: Path) -> None:
    """obdelta itself answers 502 for a failing upstream and 504 for a build in progress."""
    port = free_port()
    with (
        silent_upstream() as (upstream, _),
        front(kind, keys, port) as device,
        behind(kind, keys, tmp_path / "state", upstream, port, request_timeout="1"),
    ):
        until("it is known to be up", lambda: is_up(device))
        status, body = device.delta()
        assert status in (502, 504) and b"upstream registry" in body


@pytest.mark.parametrize("kind", KINDS)
def test_devices_wait_during_a_short_restart(kind: str) -> None:
    """The overlays give a restart 20 seconds before devices are told to pull in full."""
    text = (haproxy.OVERLAY.parent / f"{kind}.backend.cfg").read_text()
    (line,) = re.findall(r"^\tserver obdelta .*", text, re.MULTILINE)
    every, times = (int(re.findall(rf"{word} (\d+)", line)[0]) for word in ("inter", "fall"))
    assert every * times == 20


def test_a_connection_that_outlives_the_outage_is_closed(keys: Keys) -> None:
    """Otherwise a device would go on with haproxy's own certificate, and without obdelta."""
    with haproxied("pass-through", keys, free_port()) as device:
        until("it is known to be down", lambda: device.name() == TARGET)
        for path, status in ((f"/api/v3/delta?src={BASE}&dest={TARGET}", 200), ("/v2/", 503)):
            connection = device.connected()
            connection.request("GET", path, headers={"Host": HOST})
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("connection")) == (status, "close")
            answer.read()
            assert connection.sock is None
