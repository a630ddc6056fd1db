"""`obdelta status` and `obdelta builds` as a user runs them, against a real server before a real
registry.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bench.images import push
from tests.support import haproxy
from tests.support.commands import OBDELTA, environment, error_of, run
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.server import RunningServer, free_port, running_server

__all__ = ["plain_registry"]

HOST = "registry.example.com"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, plain_registry: RunningRegistry) -> Pair:
    made = make_pair(tmp_path_factory.mktemp("pair"))
    push(made.base, plain_registry.url, BASE_REPOSITORY, "latest")
    push(made.target, plain_registry.url, TARGET_REPOSITORY, "latest")
    return made


@pytest.fixture
def server(pair: Pair, plain_registry: RunningRegistry, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(
        tmp_path / "state", upstream=plain_registry.url, registry_hosts=HOST
    ) as running:
        yield running


def device(server: RunningServer, *pair: str) -> list[str]:
    return [
        "check",
        *(f"{HOST}/{repository}" for repository in pair),
        "--server",
        server.url,
        "--registry",
        server.url,
    ]


AT_FIRST = """\
obdelta {version}
state ready
builds N under way, N waiting
devices N with a request under way
served N deltas, N: N saved
store N of N GB (deltas N, layers N, trees N, upstream N)
deltas N kept"""

AFTER_ONE = """\
obdelta {version}
state ready
builds N under way, N waiting
devices N with a request under way
served N deltas, N kB: N kB saved (N)
store N kB of N GB (deltas N kB, layers N kB, trees N, upstream N kB)
deltas N kept

age kind full delta saved built in served target base
N s vN N kB N kB N N s N {target} {base}"""


def test_status(server: RunningServer, pair: Pair) -> None:
    where = ("--operator", server.operator_url)
    version = run("--version").stdout.decode().split()[1]
    text = run("status", *where).stdout.decode()
    assert normal(text) == AT_FIRST.format(version=version).replace(version, normal(version))
    run(*device(server, BASE_REPOSITORY, TARGET_REPOSITORY))
    text = run("status", *where).stdout.decode()
    target = f"{TARGET_REPOSITORY}@{pair.target.digest.hex[:12]}"
    base = f"{BASE_REPOSITORY}@{pair.base.digest.hex[:12]}"
    assert target in text and base in text
    expected = AFTER_ONE.format(version=normal(version), target=target, base=base).replace(
        "vN", "v3"
    )
    assert normal(text) == normal(expected)
    told = json.loads(run("status", *where, "--json").stdout)
    assert told["problems"] == {}
    assert told["served"]["deltas"] == told["kept"]["deltas"] == len(told["deltas"]) == 1
    (delta,) = told["deltas"]
    assert told["served"]["delta_bytes"] == delta["delta_bytes"]
    assert told["served"]["full_bytes"] == delta["full_bytes"]
    assert f" {delta['served']}  {target}" in text


def test_status_of_a_server_that_is_not_ready(tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with running_server(tmp_path / "state", upstream=gone) as server:
        where = ("--operator", server.operator_url)
        text = run("status", *where, status=3).stdout.decode()
        assert "state    not ready: upstream: upstream registry: " in text
        told = json.loads(run("status", *where, "--json", status=3).stdout)
        assert list(told["problems"]) == ["upstream"]


def test_builds_as_they_go_on(server: RunningServer) -> None:
    where = ("--operator", server.operator_url)
    assert run("builds", *where).stdout == b"no builds\n"
    assert json.loads(run("builds", *where, "--json").stdout) == {"builds": []}
    run(*device(server, BASE_REPOSITORY, TARGET_REPOSITORY))
    # Its workers wait for more to do. Stopped, they keep the next build where it is.
    workers = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, check=True
    ).stdout.split()
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)
    command = [*OBDELTA, *device(server, TARGET_REPOSITORY, BASE_REPOSITORY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as asking:
        told: list[dict[str, object]] = []
        while not told:  # until it has asked
            told = json.loads(run("builds", *where, "--json").stdout)["builds"]
        text = run("builds", *where).stdout.decode()
        for worker in workers:
            os.kill(int(worker), signal.SIGCONT)
        assert asking.wait(60) == 0
    assert (told[0]["state"], told[0]["waiting"]) == ("running", 1)
    head, line = text.splitlines()
    assert normal(head) == "state for clients at pair"
    assert line.startswith("running  ")
    assert f"v3 {TARGET_REPOSITORY}@" in line and f"{BASE_REPOSITORY}@" in line
    while run("builds", *where).stdout != b"no builds\n":
        time.sleep(0.05)  # the answer was sent before the books were closed


def test_no_server_and_a_wrong_one(server: RunningServer) -> None:
    for command in ("status", "builds"):
        nobody = f"http://127.0.0.1:{free_port()}"
        ran = run(command, "--operator", nobody, status=1)
        assert (
            error_of(ran)
            == f"obdelta: the server at {nobody} cannot be reached: Connection refused"
        )
        assert "is not the URL" in error_of(run(command, "--operator", "localhost:9100", status=2))
        assert "cannot be reached" in error_of(
            run(command, "--operator", "http://name.invalid", status=1)
        )
        assert error_of(run(command, "--operator", server.url, status=1)).endswith(
            "answered 404: is it the operators' endpoint of an obdelta?"
        )
        assert (
            error_of(run(command, "--operator", "unix:/nowhere/socket", status=1))
            == "obdelta: the server at unix:/nowhere/socket cannot be reached: No such file or"
            " directory"
        )


BEFORE_IT = """\
defaults
	mode http
	timeout client 10s
	timeout connect 10s
	timeout server 10s
userlist operators
	user anna insecure-password a:word
frontend f
	bind 127.0.0.1:{port}
	http-request auth unless {{ http_auth(operators) }}
	http-request return status 200 content-type application/json string "{{\\"builds\\":[]}}"
"""


def test_a_login_at_a_proxy(tmp_path: Path) -> None:
    port = free_port()
    where = ("builds", "--operator", f"http://127.0.0.1:{port}")
    (tmp_path / "good").write_text("anna:a:word\n")
    (tmp_path / "bad").write_text("anna:another")
    with haproxy.running(BEFORE_IT.format(port=port), tmp_path, port):
        assert run(*where, "--login", f"@{tmp_path}/good").stdout == b"no builds\n"
        assert "answered 401" in error_of(run(*where, "--login", f"@{tmp_path}/bad", status=1))
        assert "answered 401" in error_of(run(*where, status=1))
    assert "@FILE" in error_of(run(*where, "--login", "anna:a:word", status=2))
    (tmp_path / "bad").write_bytes(b"anna:\xff")
    assert "more than ASCII" in error_of(run(*where, "--login", f"@{tmp_path}/bad", status=2))


def test_a_unix_socket(pair: Pair, plain_registry: RunningRegistry, tmp_path: Path) -> None:
    path = tmp_path / "operators"
    listen = f"unix:{path}\ntcp:{free_port()}:interface=127.0.0.1"
    port = listen.split(":")[2]
    state = tmp_path / "state"
    with running_server(
        state, upstream=plain_registry.url, operator_port=int(port), operator_listen=listen
    ):
        assert run("builds", "--operator", f"unix:{path}").stdout == b"no builds\n"
        assert run("builds", "-c", conf(tmp_path, f"unix:{path}")).stdout == b"no builds\n"


def conf(folder: Path, listen: str) -> Path:
    file = folder / "tap.conf"
    file.write_text(f"[obdelta]\noperator-listen = {listen}\n")
    return file


@pytest.mark.parametrize("body", [b"[]", b"\xff"])
def test_answers_that_cannot_be_read_are_one_line(body: bytes) -> None:
    """A double of a server: no real one answers so."""

    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Odd) as odd:
        threading.Thread(target=odd.serve_forever).start()
        where = ("--operator", f"http://127.0.0.1:{odd.server_address[1]}")
        for command in (["status"], ["builds"], ["explain", "a/b", "a/c"]):
            error_of(run(*command, *where, status=1))
        odd.shutdown()
