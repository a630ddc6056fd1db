"""`obdelta gc` as a user runs it, while a server runs and while none does."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.store.lock import StateLock
from tests.support.commands import error_of, run
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until_both_forms
from tests.support.server import free_port, running_server

HOST = "registry.example.com"
BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"
LEFT = """\
freed N bytes

kept bytes
deltas N
layers N
trees N
upstream N
together N
quota N"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(
        tmp_path_factory.mktemp("pair"), size=1 << 20
    )  # its largest delta layer should be evicted


def blobs(state: Path) -> int:
    return sum(path.stat().st_size for path in (state / "blobs").rglob("*") if path.is_file())


def test_a_running_server_does_the_work_of_gc(pair: Pair, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as server:
        run("check", BASE, TARGET, "--server", server.url, "--registry", server.url)
        until_both_forms(server)
        before = blobs(state)
        error = error_of(run("gc", "--operator", server.operator_url, status=1))
        assert "set operator-passwords" in error
        where = ("-c", server.settings_file)
        text = run("gc", *where).stdout.decode()
        assert normal(text) == LEFT
        assert text.startswith("freed 0 bytes\n")
        output = json.loads(run("gc", *where, "--json").stdout)
        assert output["freed"] == output["over"] == 0
        assert output["quota"] == 20 << 30
        assert output["usage"]["deltas"] > 0 and output["usage"]["layers"] > 0
        # Without --operator the lock shows that there is a server, and the settings say where.
        port = server.operator_url.rpartition(":")[2]
        named = ("--state-dir", state, "--operator-listen", f"tcp:{port}")
        # A new delta stays, whatever is requested: a device may be pulling it.
        assert (
            json.loads(run("gc", *named, "--free", "1 TiB", "--json").stdout)["usage"]["deltas"] > 0
        )
        assert blobs(state) == before
        run("check", BASE, TARGET, "--server", server.url, "--registry", server.url)
        # The directory names the server that uses it, whatever the settings say.
        other = ("--state-dir", state, "--operator-listen", f"tcp:{free_port()}")
        assert json.loads(run("gc", *other, "--json").stdout)["quota"] == 20 << 30


def test_without_a_server_the_command_does_the_work_of_gc(pair: Pair, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as server:
        run("check", BASE, TARGET, "--server", server.url, "--registry", server.url)
    left = state / "tmp" / f"{'0' * 24}.spool"
    left.touch()
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue, catalogue:
        catalogue.execute("UPDATE deltas SET created = 1, last_served = 1")
    before = blobs(state)
    done = json.loads(run("gc", "--state-dir", state, "--json").stdout)
    assert done["freed"] == 0
    assert not left.exists()
    assert done["usage"]["deltas"] > 0
    done = json.loads(run("gc", "--state-dir", state, "--free", "1 GiB", "--json").stdout)
    assert done["freed"] > 0
    # Small parts of deltas stay, because their removal would free nothing.
    assert {kind for kind, used in done["usage"].items() if used} == {"deltas"}
    assert blobs(state) < before
    text = normal(run("gc", "--state-dir", state, "--store-quota", "1").stdout.decode())
    stays = (
        "N bytes above the quota stay: in use, served within keep-served, or too small to free"
        " anything"
    )
    assert text == f"{LEFT}\n{stays}"
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as server:
        run(
            "check",
            BASE,
            TARGET,
            "--server",
            server.url,
            "--registry",
            server.url,
            "--require-delta",
        )


@pytest_twisted.ensureDeferred
async def test_gc_does_nothing_while_another_process_holds_the_folder(
    pair: Pair, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=f"oci:{pair.root}"):
        pass
    lock = StateLock.take(state)
    nobody = f"tcp:{free_port()}"
    assert "cannot be reached" in error_of(
        run("gc", "--state-dir", state, "--operator-listen", nobody, status=1)
    )
    starting = running_server(state, upstream=f"oci:{pair.root}")
    with pytest.raises(
        AssertionError, match="the state directory is in use"
    ):  # nor does a server start
        starting.__enter__()
    await lock.release()


def test_wrong_sizes_and_other_folders_are_refused(tmp_path: Path) -> None:
    assert "--free: 'much' is no size" in error_of(run("gc", "--free", "much", status=2))
    assert "5 has no unit: write 5 MiB" in error_of(run("gc", "--free", "5", status=2))
    assert "-1' is no size" in error_of(run("gc", "--free=-1", status=2))
    nobody = ("--operator-listen", f"tcp:{free_port()}")
    message = error_of(run("gc", "--state-dir", tmp_path / "none", *nobody, status=2))
    assert f"setting state-dir has the value '{tmp_path / 'none'}'" in message
    assert "a directory with catalogue.sqlite, or a running server" in message
    assert not list(tmp_path.iterdir())
