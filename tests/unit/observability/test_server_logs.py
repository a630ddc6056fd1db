"""The log of a running server."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.test_v3 import update
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, command, free_port, running_server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("server") / "state"
    with running_server(
        state, upstream=f"oci:{pair.root}", log_format="json", log_level="info, builds=debug"
    ) as running:
        assert update(running, state.parent / "device").is_delta
        yield running


def events(server: RunningServer) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.splitlines()]


def test_every_line_is_an_object(server: RunningServer) -> None:
    parsed = events(server)
    assert {"time", "level", "area", "message"} <= set.intersection(
        *(set(event) for event in parsed)
    )
    areas = {event["area"] for event in parsed}
    assert {"web.devices.app", "builds.running_build"} <= areas


def test_a_build_logs_the_id_of_the_request_that_started_it(server: RunningServer) -> None:
    parsed = events(server)
    lines = [event for event in parsed if str(event["message"]).startswith("build: ")]
    (build,) = [event for event in lines if " form=gzip " in str(event["message"])]
    requests = [
        event
        for event in parsed
        if event.get("request") == build["request"] and event["area"] == "web.devices.app"
    ]
    assert len(requests) == 1
    fields = requests[0]["fields"]
    assert isinstance(fields, dict)
    assert fields["path"] == "/api/v3/delta"


def test_errors_say_what_to_look_for(server: RunningServer) -> None:
    for path, refusals in (
        ("/api/v3/delta", 0),  # a wrong request
        (f"/v2/{TARGET_REPOSITORY}/manifests/none", 1),
    ):
        requests = urllib.request.Request(
            f"{server.url}{path}", headers={"X-Request-Id": f"mine{len(path)}"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(requests, timeout=30)
        with refused.value as error:
            assert error.headers["x-request-id"] == f"mine{len(path)}"
            body = error.read().decode()
        # The upstream's answer is passed on unchanged.
        assert f"mine{len(path)}" in body or "none" in path
        parsed = [event for event in events(server) if event.get("request") == f"mine{len(path)}"]
        assert {event["level"] for event in parsed} == {"info"}
        why = [event for event in parsed if str(event["message"]).startswith("refused: ")]
        assert (len(parsed), len(why)) == (1 + refusals, refusals)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.operator_url}/api/v1/nothing", timeout=30)
    with refused.value as error:
        assert json.loads(error.read())["error"]["request"] == error.headers["x-request-id"]


def test_messages_are_counted(server: RunningServer) -> None:
    with urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counts = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }
    assert counts['obdelta_log_messages_total{level="info"}'] > 3
    assert counts['obdelta_log_messages_total{level="warn"}'] >= 1  # AUTH IS OFF


@pytest.mark.parametrize("how", ["text", "json"])
def test_twistd_s_logfile_is_used(tmp_path: Path, how: str) -> None:
    """A server that cannot start says so there; standard output has nothing else."""
    given = (
        "--upstream=http://127.0.0.1:9",
        "--public-url=http://127.0.0.1:9",
        f"--state-dir={tmp_path / 'state'}",
        f"--listen=tcp:{free_port()}:interface=127.0.0.1",
        "--auth=none",
        "--operator-listen=tcp:x",
        f"--log-format={how}",
    )
    twistd, *rest = command(*given)
    ran = subprocess.run(
        [twistd, f"--logfile={tmp_path / 'log'}", *rest],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    log_text = (tmp_path / "log").read_text()
    assert "obdelta cannot start: " in log_text
    assert (
        all(json.loads(line) for line in log_text.splitlines())
        if how == "json"
        else log_text.startswith("20")
    )
