"""`obdelta list` and the commands that act on its entries, on a real server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obdelta.cli.commands.server.deltas import ACTIONS, SORTS, STATES
from obdelta.store.catalogue import listed_deltas
from obdelta.web.operators import actions_api
from tests.server.test_v3 import update
from tests.support.commands import error_of, run
from tests.support.images import Pair, make_pair
from tests.support.server import RunningServer, running_server

ID = "0123456789abcdef"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)


@pytest.fixture
def server(pair: Pair, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}") as running:
        update(running, tmp_path / "device")
        yield running
        assert "Traceback" not in running.log


def listed(server: RunningServer, *options: str) -> list[dict[str, Any]]:
    found = json.loads(run("list", "--operator", server.operator_url, "--json", *options).stdout)
    return list(found["deltas"])


def test_actions_and_orders_are_those_of_the_server(server: RunningServer) -> None:
    nothing = urllib.request.Request(
        f"{server.operator_url}/api/v1/deltas/{ID}/nothing",
        b"{}",
        {"Content-Type": "application/json", **server.key_header},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(nothing, timeout=60)
    message = json.load(refused.value)["error"]["message"]
    assert message == f"the actions are {', '.join(ACTIONS)}"
    assert STATES == actions_api.STATES
    assert set(SORTS) == set(listed_deltas.SORTS)


def test_deltas_are_listed_filtered_and_paged(server: RunningServer, pair: Pair) -> None:
    found = listed(server)
    assert {delta["form"] for delta in found} == {"gzip", "zstd"}
    assert [delta["form"] for delta in listed(server, "--form", "zstd")] == ["zstd"]
    assert listed(server, "--state", "failed") == []
    assert listed(server, "--search", "no-such-thing") == []
    assert len(listed(server, "--limit", "1")) == 1
    text = run("list", "--operator", server.operator_url).stdout.decode()
    head, *rows = text.splitlines()
    assert head.split()[:4] == ["id", "state", "for", "kind"]
    assert [row.split()[0] for row in rows] == [delta["id"] for delta in found]
    assert all(" kept " in row for row in rows)
    assert pair.target.digest.hex[:12] in rows[0]
    assert run("list", "--operator", server.operator_url, "--kind", "v2").stdout == b"no deltas\n"


def test_only_users_who_can_read_the_state_may_act(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    zstd, gzip = sorted(listed(server), key=lambda delta: delta["form"], reverse=True)
    assert "actions are off" in error_of(
        run("drop", zstd["id"], "--operator", server.operator_url, status=1)
    )
    file = server.settings_file
    done = json.loads(run("drop", zstd["id"], "-c", file, "--json").stdout)
    assert [(one["id"], one["state"]) for one in done["deltas"]] == [(zstd["id"], "gone")]
    assert [delta["id"] for delta in listed(server)] == [gzip["id"]]
    run("pin", gzip["id"], "-c", file)
    assert [delta["id"] for delta in listed(server, "--state", "pinned")] == [gzip["id"]]
    assert "unpin it first" in error_of(run("drop", gzip["id"], "-c", file, status=1))
    run("unpin", gzip["id"], "-c", file)
    assert listed(server, "--state", "pinned") == []
    # The actions before the error are printed.
    ran = run("drop", gzip["id"], zstd["id"], "-c", file, status=1)
    assert gzip["id"] in ran.stdout.decode()
    assert zstd["id"] not in ran.stdout.decode()
    assert ran.stderr.startswith(f"obdelta: {zstd['id']}: the server at ".encode())
    assert listed(server) == []


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_an_unknown_entry_is_an_error(action: str, tmp_path: Path) -> None:
    nobody = f"unix:{os.fspath(tmp_path)}/none"
    assert "cannot be reached" in error_of(run(action, ID, "--operator", nobody, status=1))
    assert "is no ID of a delta" in error_of(run(action, "ABC", "--operator", nobody, status=2))
