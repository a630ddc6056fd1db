"""`obdelta status` and `obdelta builds` as a user runs them, against a real server before a real
registry.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bench.images import push
from obdelta.cli.commands.server.status import builds_as_text, status_as_text
from tests.support import haproxy
from tests.support.commands import HOST, OBDELTA, check_command, environment, error_of, run
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until, until_both_forms
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.server import RunningServer, free_port, running_server

__all__ = ["plain_registry"]


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


def test_fleets_are_listed_with_the_speed_of_their_devices() -> None:
    answer = {
        "version": "1",
        "now": 1000,
        "problems": {},
        "notes": [],
        "devices": 0,
        "builds": {"running": 0, "queued": 0},
        "served": {"deltas": 0, "full_bytes": 0, "delta_bytes": 0},
        "kept": {"deltas": 0, "usage": {}, "quota": 1},
        "deltas": [],
        "failures": [],
        "fleets": [
            {
                "repository": "v2/89ab",
                "reads": "zstd",
                "link_bits_per_second": 1_800_000.0,
                "command_microseconds": 210.0,
                "devices": 34,
            }
        ],
    }
    *_, heads, fleet = status_as_text(answer).splitlines()
    assert heads.split() == ["link", "a", "command", "devices", "reads", "fleet"]
    assert fleet.split() == ["1.8", "Mbit/s", "210", "µs", "34", "zstd", "v2/89ab"]
    older = {name: value for name, value in answer.items() if name != "fleets"}
    assert "fleet" not in status_as_text(older)


AT_FIRST = """\
obdelta {version}
state ready
builds N running, N queued
devices N with a request in progress
served N deltas, N: N saved
store N of N GB (deltas N, layers N, trees N, upstream N)
deltas N kept"""

AFTER_ONE = """\
obdelta {version}
state ready
builds N running, N queued
devices N with a request in progress
served N delta, N kB: N kB saved (N)
store N kB of N GB (deltas N kB, layers N kB, trees N, upstream N kB)
deltas N kept

id age kind full delta saved built in served target base
{ids[gzip]} N s vN gzip N kB N kB N N s N {target} {base}
{ids[zstd]} N s vN zstd N kB N kB N N s N {target} {base}"""


def test_status_prints_the_state_of_a_server(server: RunningServer, pair: Pair) -> None:
    where = ("--operator", server.operator_url)
    version = run("--version").stdout.decode().split()[1]
    text = run("status", *where).stdout.decode()
    assert normal(text) == AT_FIRST.format(version=version).replace(version, normal(version))
    run(*check_command(server, BASE_REPOSITORY, TARGET_REPOSITORY))
    until_both_forms(server)
    text = run("status", *where).stdout.decode()
    target = f"{TARGET_REPOSITORY}@{pair.target.digest.hex[:12]}"
    base = f"{BASE_REPOSITORY}@{pair.base.digest.hex[:12]}"
    assert target in text and base in text
    kept = json.loads(run("list", *where, "--json").stdout)["deltas"]
    ids = {one["form"]: one["id"] for one in kept}
    expected = AFTER_ONE.format(version=normal(version), target=target, base=base, ids=ids).replace(
        "vN", "v3"
    )
    # The newest comes first: which of the two forms that is depends on the second.
    *head, first, second = normal(text).splitlines()
    *expected_head, gzip, zstd = normal(expected).splitlines()
    assert [*head, *sorted((first, second))] == [*expected_head, *sorted((gzip, zstd))]
    output = json.loads(run("status", *where, "--json").stdout)
    assert output["problems"] == {} and output["attention"] == []
    assert output["served"]["deltas"] == 1
    assert output["kept"]["deltas"] == 2
    # The device named no engine, so it got gzip.
    delta, other = sorted(output["deltas"], key=lambda one: str(one["form"]))
    assert (other["form"], other["served"], delta["form"]) == ("zstd", 0, "gzip")
    assert output["served"]["delta_bytes"] == delta["delta_bytes"]
    assert output["served"]["full_bytes"] == delta["full_bytes"]
    assert f" {delta['served']}  {target}" in text


def test_status_of_a_server_that_is_not_ready(tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with running_server(tmp_path / "state", upstream=gone) as server:
        where = ("--operator", server.operator_url)
        text = run("status", *where, status=3).stdout.decode()
        assert "state    not ready: upstream: upstream registry: " in text
        output = json.loads(run("status", *where, "--json", status=3).stdout)
        assert list(output["problems"]) == ["upstream"]
        (problem,) = output["attention"]
        assert problem["severity"] == "error"
        assert problem["what"].startswith("Not ready: upstream: upstream registry: ")
        head, line = text.partition("\n\n")[2].splitlines()
        assert head.split() == ["attention", "for", "problem", "remedy"]
        assert problem["what"] in line and line.endswith(problem["remedy"])


def test_builds_are_printed_with_their_progress(server: RunningServer) -> None:
    where = ("--operator", server.operator_url)
    assert run("builds", *where).stdout == b"no builds\n"
    assert json.loads(run("builds", *where, "--json").stdout) == {"builds": []}
    run(*check_command(server, BASE_REPOSITORY, TARGET_REPOSITORY))
    until_both_forms(server)
    # Its worker processes are idle. Stopped, they keep the next build at its stage.
    workers = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, check=True
    ).stdout.split()
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)
    command = [*OBDELTA, *check_command(server, TARGET_REPOSITORY, BASE_REPOSITORY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as asking:
        output = until(
            "it has asked", lambda: json.loads(run("builds", *where, "--json").stdout)["builds"], 60
        )
        text = run("builds", *where).stdout.decode()
        building = json.loads(run("list", "--state", "building", *where, "--json").stdout)
        listed = [one["id"] for one in building["deltas"]]
        for worker in workers:
            os.kill(int(worker), signal.SIGCONT)
        assert asking.wait(60) == 0
    assert (output[0]["state"], output[0]["waiting"]) == ("running", 1)
    head, line = text.splitlines()
    assert normal(head) == "id state for clients at pair name"
    assert line.startswith(f"{output[0]['id']}  running  ")
    assert listed == [output[0]["id"]]
    assert f"v3 {TARGET_REPOSITORY}@" in line and f"{BASE_REPOSITORY}@" in line
    # The answer was sent before it was counted.
    until("the build is over", lambda: run("builds", *where).stdout == b"no builds\n", 60)


def test_builds_are_printed_with_the_name_of_their_target() -> None:
    build = {"state": "queued", "seconds": 3.0, "waiting": 1, "progress": {}, "pair": "v3 a -> b"}
    named = {**build, "names": {"target": {"text": "acme/web 1.4.2"}}}
    head, first, second = builds_as_text([build, named]).splitlines()
    assert head.endswith("name")
    assert first.endswith("v3 a -> b")
    assert second.endswith("v3 a -> b  acme/web 1.4.2")


def test_a_missing_and_a_wrong_server_are_reported(server: RunningServer, tmp_path: Path) -> None:
    for command in ("status", "builds"):
        nobody = f"http://127.0.0.1:{free_port()}"
        ran = run(command, "--operator", nobody, status=1)
        assert (
            error_of(ran)
            == f"obdelta: the server at {nobody} cannot be reached: Connection refused"
        )
        port = nobody.rpartition(":")[2]
        file = conf(tmp_path, f"tcp:{port}:interface=127.0.0.1")
        assert error_of(run(command, "-c", file, status=1)) == (
            f"obdelta: the server at {nobody} cannot be reached: Connection refused: is it running?"
            " -c FILE or --operator URL names another server"
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


def test_a_proxy_that_wants_a_login_is_reported(tmp_path: Path) -> None:
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
    assert "is not ASCII" in error_of(run(*where, "--login", f"@{tmp_path}/bad", status=2))


def test_status_works_over_a_unix_socket(
    pair: Pair, plain_registry: RunningRegistry, tmp_path: Path
) -> None:
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
def test_unreadable_answers_are_reported_in_one_line(body: bytes) -> None:
    """A double of a server, because no real one answers so."""

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
