"""`obdelta build` and `obdelta check` as a user runs them, on real images."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdelta.oci import parse_config
from tests.support.commands import CLEARED, error_of, on_terminal, run
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server

HOST = "registry.example.com"
BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("server") / "state"
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as running:
        yield running


def check(
    server: RunningServer, *arguments: object, status: int = 0
) -> subprocess.CompletedProcess[bytes]:
    return run("check", *arguments, "--server", server.url, "--registry", server.url, status=status)


def test_check_verifies_a_delta(server: RunningServer, pair: Pair) -> None:
    text = check(server, BASE, TARGET).stdout.decode()
    assert text.startswith(f"verified: delta {server.host}/{TARGET_REPOSITORY}:delta-")
    assert f"image ID       {pair.target.image_id}\n" in text
    assert check(server, BASE, TARGET, "--require-delta").stdout


def test_check_prints_json(server: RunningServer, pair: Pair) -> None:
    target = f"{TARGET}@{pair.target.digest}"
    figures = json.loads(check(server, BASE, target, "--json").stdout)
    assert figures["verified"] is True
    assert figures["is_delta"] is True
    assert figures["image_id"] == str(pair.target.image_id)
    small = len(pair.target.manifest) + len(pair.target.config)
    assert figures["full_bytes"] == small + sum(layer.size for layer in pair.target.layers[1:])
    assert 0 < figures["pulled_bytes"] < figures["full_bytes"]


def test_check_verifies_a_full_pull_and_reports_it_as_one(server: RunningServer) -> None:
    text = check(server, TARGET, TARGET).stdout.decode()
    assert text.startswith(f"verified: full pull (the server has no delta) {TARGET}")
    assert check(server, TARGET, TARGET, "--require-delta", status=3).stdout


def test_check_fails_in_one_line(server: RunningServer, tmp_path: Path) -> None:
    unknown = f"{HOST}/v2/{'0' * 32}"
    missing = error_of(check(server, unknown, TARGET, status=1))
    assert "answered 404" in missing and missing.endswith(
        ": check the names of the images, and that --server is an obdelta"
    )
    assert "answered 404" in error_of(check(server, BASE, unknown, status=1))
    assert "bad image reference" in error_of(check(server, "UPPER/case", TARGET, status=1))
    assert "answered 400" in error_of(
        check(server, BASE, f"elsewhere.example.com/{TARGET_REPOSITORY}", status=1)
    )
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens there
    silent = error_of(
        run("check", BASE, TARGET, "--server", nobody, "--registry", nobody, status=1)
    )
    assert "refused: check that it runs, the URLs of --server and --registry" in silent
    assert "names no host" in error_of(run("check", "a/b", "a/c", "--server", server.url, status=1))
    assert "PEM" in error_of(check(server, BASE, TARGET, "--ca", __file__, status=1))


def test_build_makes_a_layout_that_other_tools_read(pair: Pair, tmp_path: Path) -> None:
    layout = tmp_path / "deltas" / "layout"
    text = run(
        "build",
        "--upstream",
        f"oci:{pair.root}",
        BASE_REPOSITORY,
        f"{TARGET_REPOSITORY}@{pair.target.digest}",
        "-o",
        layout,
    ).stdout.decode()
    name = text.splitlines()[0].removeprefix("built        ")
    assert name.startswith(f"{layout}:delta-")
    assert [path.name for path in layout.parent.iterdir()] == ["layout"]
    inspected = json.loads(
        subprocess.run(
            ["skopeo", "inspect", "--config", f"oci:{name}"], check=True, capture_output=True
        ).stdout
    )
    labels = inspected["config"]["Labels"]
    assert labels["io.resin.delta.base"] == str(pair.base.image_id)
    assert parse_config(labels["io.resin.delta.config"].encode()).image_id == pair.target.image_id
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci:{name}", f"dir:{tmp_path / 'copied'}"], check=True
    )
    before = (layout / "index.json").read_bytes()
    run("build", "--upstream", f"oci:{pair.root}", BASE_REPOSITORY, TARGET_REPOSITORY, "-o", layout)
    assert (
        layout / "index.json"
    ).read_bytes() == before  # the same contents give the same delta under the same tag
    back = run(
        "build", "--upstream", f"oci:{pair.root}", TARGET_REPOSITORY, BASE_REPOSITORY, "-o", layout
    ).stdout.decode()
    assert len(json.loads((layout / "index.json").read_bytes())["manifests"]) == 2
    assert back.splitlines()[0] != text.splitlines()[0]


def test_build_fails_in_one_line_and_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    upstream = ("--upstream", f"oci:{pair.root}")
    unknown = f"v2/{'0' * 32}"
    ran = run("build", *upstream, BASE_REPOSITORY, unknown, "-o", tmp_path / "out", status=1)
    assert f"repository {unknown} is unknown" in error_of(ran)
    assert not list(tmp_path.iterdir())
    assert "setting upstream is missing" in error_of(
        run("build", "a", "b", "-o", tmp_path / "out", status=2)
    )


def test_build_shows_a_bar_on_a_terminal_only(pair: Pair, tmp_path: Path) -> None:
    command = ["build", "--upstream", f"oci:{pair.root}", BASE_REPOSITORY, TARGET_REPOSITORY, "-o"]
    shown = on_terminal(*command, tmp_path / "a")
    assert b"fetch" in shown
    assert b"layer " in shown
    assert shown.endswith(CLEARED)  # wiped away in the end
    assert run(*command, tmp_path / "b").stderr == b""
