"""``processes = N``: every process gives the same answers, ends alone if it is killed, and ends
with the main process. The real server, Debian's registry.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.images import file, make_image, make_layer, push
from obdelta.oci.manifest import ACCEPT
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import connection_to, further, resident_bytes, serving, until
from tests.support.registry import running_registry
from tests.support.server import STOP_SECONDS, RunningServer, running_server
from tests.support.tokens import make_certificate, make_key, private_pem

BIG_REPOSITORY = "v2/" + "c3" * 16
BIG = 48 << 20
ABSENT = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    work = tmp_path_factory.mktemp("big")
    layer = make_layer(
        [file("noise", random.Random(1).randbytes(BIG))], work / "blobs", compression="plain"
    )
    big = make_image([layer], work / "image")
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(pair.base, running.url, BASE_REPOSITORY)
        push(pair.target, running.url, TARGET_REPOSITORY)
        push(big, running.url, BIG_REPOSITORY)
        yield running.url


@pytest.fixture(scope="module")
def server(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(
        tmp_path_factory.mktemp("server") / "state", upstream=registry, processes="3"
    ) as running:
        serving(running, 2)
        yield running


def ask(
    connection: http.client.HTTPConnection, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection.request(
        method,
        path,
        headers={
            "Accept": ", ".join(ACCEPT),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
    )
    answer = connection.getresponse()
    return (
        answer.status,
        {k.lower(): v for k, v in answer.getheaders() if k.lower() != "date"},
        answer.read(),
    )


def big_layer(connection: http.client.HTTPConnection) -> str:
    manifest = json.loads(ask(connection, f"/v2/{BIG_REPOSITORY}/manifests/latest")[2])
    return str(manifest["layers"][0]["digest"])


def test_all_processes_answer_alike(server: RunningServer) -> None:
    ids = [server.process.pid, *serving(server, 2)]
    connections = {pid: connection_to(server, pid) for pid in ids}
    first = connections[ids[1]]
    question = (
        f"src={server.host}/{BASE_REPOSITORY}&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    )
    status, _, body = ask(first, f"/api/v3/delta?{question}")
    assert status == 200, body
    tag = json.loads(body)["name"].rpartition(":")[2]
    assert tag.startswith("delta-")
    root = f"/v2/{TARGET_REPOSITORY}"
    status, headers, raw = ask(first, f"{root}/manifests/{tag}")
    assert (
        status == 200
        and "sha256:" + hashlib.sha256(raw).hexdigest() == headers["docker-content-digest"]
    )
    manifest = json.loads(raw)
    # Sent as a supervisor: other clients would get a batch that is still being written.
    status, headers, _ = ask(
        first, f"/api/v2/delta?{question}", User_Agent="Supervisor/14.9.4 (Linux)"
    )
    assert status == 300
    where = urlsplit(headers["location"])
    batch = f"{where.path}?{where.query}"
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/healthz", {}),
        ("GET", "/v2/", {}),
        ("GET", "/nothing", {}),
        ("POST", "/v2/", {}),
        ("GET", "/v2/UPPER/manifests/latest", {}),
        ("GET", f"/api/v3/delta?{question}", {}),
        ("GET", "/api/v3/delta", {}),
        ("GET", f"{root}/manifests/{tag}", {}),
        ("HEAD", f"{root}/manifests/{tag}", {}),
        ("GET", f"{root}/manifests/{headers.get('docker-content-digest', tag)}", {}),
        ("HEAD", f"{root}/manifests/latest", {}),
        ("GET", f"{root}/manifests/latest", {}),
        ("GET", f"{root}/manifests/absent", {}),
        ("GET", f"{root}/tags/list", {}),
        ("GET", f"{root}/blobs/{ABSENT}", {}),
        ("GET", batch, {}),
        ("HEAD", batch, {}),
        ("GET", batch, {"Range": "bytes=7-90"}),
        ("GET", batch[:-1] + ("0" if batch[-1] != "0" else "1"), {}),
        ("GET", f"{where.path}?full-pull=yes", {}),
    ]
    for part in [manifest["config"], *manifest["layers"]]:
        path = f"{root}/blobs/{part['digest']}"
        requests += [("GET", path, {}), ("HEAD", path, {}), ("GET", path, {"Range": "bytes=5-"})]
        requests += [
            ("GET", path, {"Range": f"bytes={part['size']}-"}),
            ("GET", path, {"If-None-Match": "*"}),
        ]
    unlike = []
    for method, path, given in requests:
        answers = [
            ask(connection, path, method, X_Request_Id="alike", **given)
            for connection in connections.values()
        ]
        if any(answer != answers[0] for answer in answers):
            unlike.append((method, path, given, answers))
    assert not [
        (method, path, given, [(a[0], a[1], len(a[2])) for a in answers])
        for method, path, given, answers in unlike
    ]
    for connection in connections.values():
        connection.close()


def test_metrics_are_those_of_all_processes(server: RunningServer) -> None:
    ids = [server.process.pid, *serving(server, 2)]
    connections = {pid: connection_to(server, pid) for pid in ids}
    # Asked for by no other test: what a process has counted comes some seconds later.
    path, route = f"/v2/a/referrers/{ABSENT}", 'route="/v2/{name}/referrers/{digest}"'
    for number, connection in enumerate(connections.values(), 1):
        for _ in range(number):
            assert ask(connection, path)[0] == 404
    until("all were counted", lambda: metrics(server, "obdelta_http_requests_total", route) == 6)
    until(
        "all are connected",
        lambda: metrics(server, "obdelta_http_connections", "devices") == len(ids),
    )
    for connection in connections.values():
        connection.close()


def metrics(server: RunningServer, name: str, label: str = "devices") -> float:
    """Returns the sum of a metric's series whose labels contain a text."""
    with urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].split(" ")[0] == name and label in line
    )


def test_a_slow_device_slows_what_is_forwarded(server: RunningServer) -> None:
    additional = serving(server, 2)[0]
    connection = connection_to(server, additional)
    path = f"/v2/{BIG_REPOSITORY}/blobs/{big_layer(connection)}"
    until(
        "the face's connection is in the metrics",
        lambda: metrics(server, "obdelta_http_connections", "devices") >= 1,
    )
    before = {pid: resident_bytes(pid, "VmRSS") for pid in (additional, server.process.pid)}
    connection.request("GET", path)
    answer = connection.getresponse()
    read = answer.read(1)
    # While nothing is read, another complete body passes: by then the stalled one would have had
    # its effect.
    other = connection_to(server, additional)
    whole = ask(other, path)[2]
    for pid, resident in before.items():
        assert resident_bytes(pid) - resident < 24 << 20, "a body of 48 MiB was taken into memory"
    until(
        "the other body is in the metrics",
        lambda: metrics(server, "obdelta_http_response_bytes_total") >= BIG,
    )
    assert (
        metrics(server, "obdelta_devices_connected", "") == 1
    )  # counted once, not in each process that it passes through
    assert read + answer.read() == whole and len(whole) > BIG
    connection.close()
    other.close()


def test_a_device_that_leaves_ends_its_request_in_the_main_process(
    registry: str, tmp_path: Path
) -> None:
    with running_server(
        tmp_path / "state", upstream=registry, processes="2", max_requests="1"
    ) as server:
        (additional,) = serving(server, 1)
        connection = connection_to(server, additional)
        path = f"/v2/{BIG_REPOSITORY}/blobs/{big_layer(connection)}"
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read(1)
        main = connection_to(server, server.process.pid)
        # Counted in the process that serves it, for the device's own address.
        assert ask(main, path)[0] == 429
        answer.close()
        connection.close()
        until(
            "its request is given back",
            lambda: ask(main, f"/v2/{BIG_REPOSITORY}/tags/list")[0] == 200,
        )
        main.close()


def test_a_killed_process_is_replaced_and_the_others_go_on(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, processes="3") as server:
        first, second = serving(server, 2)
        left = connection_to(server, second)
        os.kill(first, signal.SIGKILL)
        until("it is gone", lambda: first not in further(server))
        assert ask(left, "/healthz")[0] == 200
        until("another one serves", lambda: server.log.count(" is ready (pid ") == 3)
        (third,) = set(further(server)) - {second}
        connection = connection_to(server, third)
        assert ask(connection, "/v2/")[0] == 200
        connection.close()
        left.close()
        assert "process 2 ended unexpectedly" in server.log
        with urllib.request.urlopen(f"{server.operator_url}/readyz") as answer:
            assert b"processes: 1 + 2 of 2 serve" in answer.read()
        # The counts of the ended process stay.
        until(
            "all requests are counted",
            lambda: _counted(server, "/healthz") >= 1 and _counted(server, "/v2/") >= 1,
        )


def test_all_processes_end_with_the_main_process(registry: str, tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=registry, processes="3", stop_with=signal.SIGKILL
    ) as server:
        ids = serving(server, 2)
        server.process.kill()
        until("all are gone", lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in ids))


def test_a_stop_lets_processes_finish_their_responses(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, processes="2", drain="60") as server:
        (additional,) = serving(server, 1)
        connection = connection_to(server, additional)
        digest = big_layer(connection)
        connection.request("GET", f"/v2/{BIG_REPOSITORY}/blobs/{digest}")
        answer = connection.getresponse()
        server.process.send_signal(signal.SIGTERM)
        until("nobody accepts", lambda: not _accepts(server))
        body = answer.read()
        connection.close()
        assert "sha256:" + hashlib.sha256(body).hexdigest() == digest
        assert server.process.wait(STOP_SECONDS) == 0
        assert not Path(f"/proc/{additional}/exe").exists()


def _counted(server: RunningServer, route: str) -> float:
    with urllib.request.urlopen(f"{server.operator_url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    wanted = f'obdelta_http_requests_total{{endpoint="devices",route="{route}"'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted))


def _accepts(server: RunningServer) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.connect()
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()
    return True


@pytest.mark.parametrize("kind", ["ssl", "unix"])
def test_settings_that_processes_cannot_share_are_refused(
    registry: str, tmp_path: Path, kind: str
) -> None:
    key = make_key("ES256")
    pem = tmp_path / "both.pem"
    pem.write_bytes(private_pem(key) + make_certificate(key, "localhost"))
    listen = (
        f"ssl:0:privateKey={pem}:certKey={pem}" if kind == "ssl" else f"unix:{tmp_path / 'socket'}"
    )
    with (
        pytest.raises(AssertionError, match="with processes > 1"),
        running_server(tmp_path / "state", upstream=registry, processes="2", listen=listen),
    ):
        pass
