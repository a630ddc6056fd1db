"""Deltas before devices ask: ``POST /api/v1/prepare`` and ``obdelta prepare`` on a real server
before a real registry.
"""

from __future__ import annotations

import http.client
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.images import file, make_image, make_layer, push
from obdelta.cli.commands.server import prepare as prepare_command
from obdelta.cli.main import main
from obdelta.device.http import Http
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack

NEXT_REPOSITORY = "v2/" + "c3" * 16
"""An image with other files."""
SIBLING_REPOSITORY = "v2/" + "d4" * 16
"""The release after the target."""
PAIR = {"src": BASE_REPOSITORY, "dest": TARGET_REPOSITORY}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Yields one registry for all tests; each server has its own state."""
    root = tmp_path_factory.mktemp("prepare")
    with running_stack(root / "stack", make_pair(root / "pair")) as running:
        other = make_pair(root / "next", seed=1, size=260 * 1024).target
        more = make_layer([file("app/more", b"more" * 1000)], root / "blobs")
        sibling = make_image([*running.pair.target.layers, more], root / "sibling")
        for image, repository in ((other, NEXT_REPOSITORY), (sibling, SIBLING_REPOSITORY)):
            authorization = running.push_authorization(repository)
            push(image, running.registry.url, repository, "latest", authorization=authorization)
        yield running


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[RunningServer]:
    with stack.server() as running:
        yield running


@pytest.fixture(autouse=True)
def commands_look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_command, "PAUSE", 0.05)


def call(
    server: RunningServer,
    method: str,
    path: str,
    body: Any = None,
    authorization: str | None = None,
) -> tuple[int, dict[str, Any]]:
    content = None if body is None else json.dumps(body).encode()
    headers = server.key_header
    if content is not None:
        headers["Content-Type"] = "application/json"
    if authorization is not None:
        headers["X-Registry-Authorization"] = authorization
    with Http(timeout=60).request(
        method, server.operator_url + path, headers, body=content
    ) as answer:
        return answer.status, json.loads(answer.small(1 << 20))


def begun(server: RunningServer, body: Any, authorization: str | None = None) -> dict[str, Any]:
    status, preparation = call(server, "POST", "/api/v1/prepare", body, authorization)
    assert status == 202, preparation
    return preparation


def events(server: RunningServer, id_: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns all events of a stream, to its end."""
    connection = http.client.HTTPConnection(urlsplit(server.operator_url).netloc, timeout=60)
    connection.request("GET", f"/api/v1/prepare/{id_}/events")
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream"
    found = []
    for block in answer.read().decode().split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")
        )
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    connection.close()
    return found


def finished(
    server: RunningServer, body: Any, authorization: str | None = None
) -> list[dict[str, Any]]:
    """The jobs of a list, once it is done."""
    preparation = begun(server, body, authorization)
    kind, last = events(server, preparation["id"])[-1]
    assert kind == "done" and last["done"]
    assert call(server, "GET", f"/api/v1/prepare/{preparation['id']}") == (200, last)
    jobs: list[dict[str, Any]] = last["jobs"]
    return jobs


def test_pairs_are_prepared_for_both_versions_and_directions(
    server: RunningServer, stack: Stack, tmp_path: Path
) -> None:
    preparation = begun(server, {"pairs": [PAIR], "kinds": ["v3", "v2"], "rollback": True})
    assert [(job["kind"], job["src"], job["dest"]) for job in preparation["jobs"]] == [
        (kind, source, target)
        for source, target in (
            (BASE_REPOSITORY, TARGET_REPOSITORY),
            (TARGET_REPOSITORY, BASE_REPOSITORY),
        )
        for kind in ("v3", "v2")
    ]
    seen = events(server, preparation["id"])
    assert seen[-1][0] == "done"
    for job in seen[-1][1]["jobs"]:
        assert job["state"] == "ready", job
        assert 0 < job["delta_bytes"] < job["full_bytes"]
        assert (job["name"] is None) == (job["kind"] == "v2")
        assert job["kind"] == "v2" or job["name"].startswith(f"{server.host}/{job['dest']}:delta-")
        assert job["ratio"] == round(job["delta_bytes"] / job["full_bytes"], 4)
        assert call(server, "GET", f"/api/v1/prepare/{job['id']}") == (200, job)
        assert [name for name, _ in seen].count(job["id"]) >= 2  # at first, and when it was ready
    # Devices find them there.
    built = server.log.count("form=gzip outcome=ready")
    assert built >= 2 and stack.update(server, tmp_path / "work").is_delta
    assert server.log.count("form=gzip outcome=ready") == built
    # Once more: everything is ready at once.
    again = finished(server, {"pairs": [PAIR]})
    assert again[0]["state"] == "ready" and server.log.count("form=gzip outcome=ready") == built


def test_the_bases_that_devices_requested_last(stack: Stack) -> None:
    with stack.server("last") as server:
        wanted = {"dest": NEXT_REPOSITORY, "last": 5}
        status, error = call(server, "POST", "/api/v1/prepare", wanted)
        assert status == 400 and "no device runs an image" in error["error"]["message"]
        stack.name(server)
        # The next release, found by the layers that it begins with.
        sibling = {"dest": SIBLING_REPOSITORY, "last": 5}
        jobs = finished(server, sibling)
        assert [job["src"] for job in jobs] == [TARGET_REPOSITORY, BASE_REPOSITORY]
        # Between the two closest images a delta would save nothing.
        assert [(job["state"], job["category"]) for job in jobs] == [
            ("full-pull", "not-worth"),
            ("ready", None),
        ]
        assert 0 < jobs[0]["full_bytes"] < jobs[1]["full_bytes"] and jobs[0]["delta_bytes"] is None
        assert len(finished(server, {**sibling, "last": 1})) == 1
        assert (
            call(server, "POST", "/api/v1/prepare", {"dest": "v2/" + "00" * 16, "last": 5})[0]
            == 404
        )
        # An image that has nothing in common with what devices run.
        assert call(server, "POST", "/api/v1/prepare", wanted)[0] == 400
        # A device updated from base to target, so devices run both.
        jobs = finished(server, {**wanted, "like": TARGET_REPOSITORY})
        assert {job["src"].partition("@")[0].partition(":")[0] for job in jobs} == {
            TARGET_REPOSITORY,
            BASE_REPOSITORY,
        }
        assert {job["dest"] for job in jobs} == {NEXT_REPOSITORY}
        assert [job["state"] for job in jobs] == ["ready", "ready"]
        assert len(finished(server, {**wanted, "last": 1, "like": TARGET_REPOSITORY})) == 1
        # Known without `like` after a device has sent a request, also after a restart.
        jobs = finished(server, {"dest": TARGET_REPOSITORY, "last": 3})
        assert [job["src"].partition("@")[0] for job in jobs] == [BASE_REPOSITORY]


def test_wait_true_waits_longer_than_hold_and_requested_bases_survive_a_restart(
    stack: Stack,
) -> None:
    with stack.server("again", request_timeout="0") as server:
        for version, ready in ((2, 300), (3, 200)):
            assert stack.ask(server, "", version)[0] in (502, 504)
            assert stack.ask(server, "&wait=true", version)[0] == ready
    with stack.server("again") as server:
        (job,) = finished(server, {"dest": f"{stack.registry.host}/{TARGET_REPOSITORY}", "last": 3})
        assert job["state"] == "ready" and job["src"].startswith(BASE_REPOSITORY)


def test_unavailable_images_are_reported_for_each_pair(server: RunningServer, stack: Stack) -> None:
    gone = "v2/" + "00" * 16
    jobs = finished(
        server,
        {
            "pairs": [
                {"src": gone, "dest": TARGET_REPOSITORY},
                {"src": BASE_REPOSITORY, "dest": gone},
            ]
        },
    )
    assert jobs[0]["state"] == "full-pull" and "base is gone" in jobs[0]["reason"]
    assert jobs[0]["category"] == "base-gone" and jobs[0]["full_bytes"] is None
    assert (
        jobs[1]["state"] == "failed" and "unknown" in jobs[1]["reason"] and jobs[1]["ratio"] is None
    )


BAD_BODIES: list[Any] = [
    {},
    {"pairs": []},
    {"pairs": [{"src": BASE_REPOSITORY, "dest": BASE_REPOSITORY}]},
    {"pairs": [{"src": "a"}]},
    {"pairs": [PAIR], "last": 3},
    {"pairs": [PAIR], "kinds": ["v4"]},
    {"pairs": [PAIR], "kinds": []},
    {"pairs": [PAIR], "rollback": "yes"},
    {"pairs": [PAIR], "more": 1},
    {"pairs": [{**PAIR, "src": "elsewhere.example.com/a"}]},
    {"pairs": [{**PAIR, "src": "a:delta-0123456789abcdef"}]},
    {"pairs": [{"src": f"v2/{number:032x}", "dest": TARGET_REPOSITORY} for number in range(1001)]},
    {"dest": TARGET_REPOSITORY},
    {"dest": TARGET_REPOSITORY, "last": 0},
    {"dest": 7, "last": 1},
    [PAIR],
]


def test_bad_bodies_and_unknown_lists(server: RunningServer) -> None:
    for body in BAD_BODIES:
        status, error = call(server, "POST", "/api/v1/prepare", body)
        assert status == 400 and error["error"]["message"], body
    preparation = begun(server, {"pairs": [PAIR]})
    for path in ("x", "x-1", f"{preparation['id']}-2", f"{preparation['id']}-1/events"):
        assert call(server, "GET", f"/api/v1/prepare/{path}")[0] == 404


def test_a_preparation_uses_the_credentials_of_its_request(stack: Stack) -> None:
    body = {"pairs": [PAIR]}
    with stack.server(
        "device", upstream_credentials="device", environment={"TOKEN_AUTH_BUILDER_TOKEN": ""}
    ) as server:
        (job,) = finished(server, body)
        assert job["state"] == "failed"
        (job,) = finished(server, body, f"Bearer {stack.token(TARGET_REPOSITORY)}")
        assert job["state"] == "failed"
        (job,) = finished(server, body, f"Bearer {stack.token()}")
        assert job["state"] == "ready"
        assert stack.token() not in server.log
    # Devices send their own credentials, and there is a builder's token: it is used.
    with stack.server("builder", upstream_credentials="device") as server:
        (job,) = finished(server, body)
        assert job["state"] == "ready"


def test_published_in_the_registry_with_its_sizes(stack: Stack) -> None:
    with stack.server("pushed", publish="registry") as server:
        (first,) = finished(server, {"pairs": [PAIR]})
        assert first["name"].startswith(f"{stack.registry.host}/{TARGET_REPOSITORY}:delta-")
    with stack.server("pushed-found", publish="registry") as server:
        (found,) = finished(server, {"pairs": [PAIR]})
        sizes = ("name", "full_bytes", "delta_bytes", "ratio")
        assert "build:" not in server.log and [found[name] for name in sizes] == [
            first[name] for name in sizes
        ]


# -- the command -------------------------------------------------------------------------------


def prepare(
    server: RunningServer, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    status = main(["prepare", "-c", str(server.settings_file), *arguments])
    expected = capsys.readouterr()
    return status, expected.out, expected.err


def test_the_prepare_command_prints_the_result_of_each_pair(
    server: RunningServer, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = prepare(server, capsys, BASE_REPOSITORY, TARGET_REPOSITORY)
    assert status == 0 and "ready" in out and "%" in out
    status, out, _ = prepare(
        server, capsys, "--json", "--rollback", "--kind", "both", BASE_REPOSITORY, TARGET_REPOSITORY
    )
    jobs = json.loads(out)["jobs"]
    assert status == 0 and len(jobs) == 4
    largest = max(
        job["delta_bytes"] for job in jobs if job["src"] == BASE_REPOSITORY and job["kind"] == "v3"
    )
    for limit, wanted in ((largest, 0), (largest - 1, 3)):
        assert (
            prepare(
                server, capsys, "--fail-above", f"{limit} B", BASE_REPOSITORY, TARGET_REPOSITORY
            )[0]
            == wanted
        )
    stack.name(server)
    status, out, _ = prepare(
        server, capsys, "--last", "4", "--like", TARGET_REPOSITORY, NEXT_REPOSITORY
    )
    assert status == 0 and out.count("ready") == 2
    assert prepare(server, capsys, "v2/" + "00" * 16, TARGET_REPOSITORY)[0] == 3
    # If a delta would save nothing, the size of the full pull counts.
    for limit, wanted in (("1 MB", 0), ("1000 B", 3)):
        status, out, _ = prepare(
            server, capsys, "--fail-above", limit, TARGET_REPOSITORY, SIBLING_REPOSITORY
        )
        assert status == wanted and "full-pull" in out and "the delta is too large" in out
    assert prepare(server, capsys, BASE_REPOSITORY, "v2/" + "00" * 16)[0] == 1
    status, out, _ = prepare(server, capsys, "--no-wait", BASE_REPOSITORY, TARGET_REPOSITORY)
    assert status == 0 and call(server, "GET", f"/api/v1/prepare/{out.strip()}")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a"], "images are given in pairs"),
        (["--last", "2", "a", "b"], "--last takes one image"),
        (["--like", "a", "b", "c"], "--like requires --last"),
        (
            ["--no-wait", "--fail-above", "1 MB", "a", "b"],
            "--fail-above cannot be used with --no-wait",
        ),
        (["--fail-above", "much", "a", "b"], "--fail-above: 'much' is no size"),
        (["--fail-above", "20", "a", "b"], "20 has no unit: write 20 MiB"),
        (["--last", "-1", "a"], "--last: '-1' is no number from 1"),
        (["--authorization", "Bearer x", "a", "b"], "--authorization must name a file"),
    ],
)
def test_wrong_usage_of_the_prepare_command_is_reported(
    arguments: Sequence[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--operator", "http://127.0.0.1:9", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_progress_bar_is_drawn_on_a_terminal(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert prepare(server, capsys, "--rollback", BASE_REPOSITORY, TARGET_REPOSITORY)[0] == 0
    assert "0/2" in terminal.getvalue() and "[" in terminal.getvalue()
