"""`obdelta verify` as a user runs it: beside a server, without one, and after every kind of
damage.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.commands import CLEARED, OBDELTA, environment, error_of, on_terminal, run
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.interrupting import assert_ended, silent_server, started
from tests.support.server import RunningServer, running_server

HOST = "registry.example.com"
BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


def deltas_made(server: RunningServer) -> None:
    """Makes deltas in both directions, so that two bases are needed."""
    for names in ((BASE, TARGET), (TARGET, BASE)):
        run("check", *names, "--server", server.url, "--registry", server.url, "--require-delta")


@pytest.fixture(scope="module")
def made(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a state directory of a stopped server, with two pairs' deltas in both forms."""
    state = tmp_path_factory.mktemp("made") / "state"
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as server:
        deltas_made(server)
    return state


@pytest.fixture
def state(made: Path, tmp_path: Path) -> Iterator[Path]:
    """Yields a copy to damage; at the end only the damage may have changed it."""
    copy = tmp_path / "state"
    shutil.copytree(made, copy)
    yield copy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def verify(state: Path, pair: Pair, *options: object, status: int = 0) -> str:
    ran = run(
        "verify", "--state-dir", state, "--upstream", f"oci:{pair.root}", *options, status=status
    )
    assert ran.stderr == b""
    return ran.stdout.decode()


def verify_json(state: Path, pair: Pair, *options: object, status: int = 0) -> dict[str, object]:
    value: dict[str, object] = json.loads(verify(state, pair, "--json", *options, status=status))
    return value


def states(value: dict[str, object]) -> list[str]:
    deltas = value["deltas"]
    assert isinstance(deltas, list)
    return [delta["state"] for delta in deltas]


def layer_blobs(state: Path) -> list[Path]:
    """Returns the layers' blobs, the largest first."""
    blobs = [path for path in (state / "blobs").rglob("*") if path.is_file()]
    return sorted(blobs, key=lambda path: -path.stat().st_size)


ALL_IS_WELL = """\
state-dir {state}
files N hashed, N bytes, N damaged
deltas N: N proven"""


def test_a_good_store_is_verified_with_and_without_a_running_server(
    state: Path, pair: Pair
) -> None:
    text = verify(state, pair)
    assert normal(text) == ALL_IS_WELL.format(state=state)
    assert "deltas     4: 4 proven\n" in text
    before = sorted(
        (path.name, path.stat().st_size)
        for path in state.rglob("*")
        if path.is_file() and "sqlite" not in path.name
    )
    value = verify_json(state, pair)
    assert states(value) == ["proven"] * 4
    after = sorted(
        (path.name, path.stat().st_size)
        for path in state.rglob("*")
        if path.is_file() and "sqlite" not in path.name
    )
    assert after == before
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST):
        assert normal(verify(state, pair)) == ALL_IS_WELL.format(state=state)
    for log in state.parent.glob("*.log"):
        log.unlink()


def test_bases_are_fetched_where_they_are_not_cached(state: Path, pair: Pair) -> None:
    for path in (state / "layers").iterdir():
        path.unlink()
    value = verify_json(state, pair, "--no-fetch")
    assert states(value) == ["unproven"] * 4
    text = verify(state, pair, "--no-fetch")
    assert normal(text).startswith(
        f"state-dir {state}\nfiles N hashed, N bytes, N damaged\ndeltas N: N unproven\n\nunproven"
        " deltas\n"
    )
    assert "is not in the cache, and nothing is fetched (--no-fetch)" in text
    assert states(verify_json(state, pair)) == ["proven"] * 4


def test_a_damaged_cache_is_not_trusted(state: Path, pair: Pair) -> None:
    for path in (state / "layers").glob("*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert states(verify_json(state, pair)) == ["proven"] * 4


def test_without_the_upstream_deltas_stay_unproven_and_untouched(state: Path, pair: Pair) -> None:
    ran = run("verify", "--state-dir", state, "--upstream", "http://127.0.0.1:9", "--json")
    value = json.loads(ran.stdout)
    assert states(value) == ["unproven"] * 4
    assert "its base is unavailable: upstream registry: " in value["deltas"][0]["problem"]
    ran = run("verify", "--state-dir", state, "--no-proof", "--json")
    assert states(json.loads(ran.stdout)) == ["hashed"] * 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_found(state: Path, pair: Pair, damage: str) -> None:
    blob = layer_blobs(state)[0]
    content = bytearray(blob.read_bytes())
    if damage == "gone":
        blob.unlink()
    elif damage == "cut":
        blob.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
    value = verify_json(state, pair, status=3)
    files = value["files"]
    assert isinstance(files, dict)
    (broken,) = files["damaged"]
    assert broken["digest"] == f"sha256:{blob.name}"
    says = {
        "gone": "it is missing",
        "cut": f"it has {len(content) - 1} bytes, not {len(content)}",
        "flipped": "it hashes to sha256:",
    }
    assert broken["problem"].startswith(says[damage])
    assert sorted(states(value)) == ["damaged", *["proven"] * 3]
    text = verify(state, pair, status=3)
    assert f"damaged files\n  sha256:{blob.name}: {says[damage]}" in text
    assert (
        "damaged deltas\n  v3 v2/" in text and f": its file sha256:{blob.name} is damaged" in text
    )


def test_damage_is_repaired_as_documented(state: Path, pair: Pair) -> None:
    blob = layer_blobs(state)[0]
    size = blob.stat().st_size
    blob.write_bytes(bytes(size))
    text = verify(state, pair, "--heal", status=3)
    assert text.endswith(
        "files removed: when the server starts, it drops the deltas that they belong to\n"
    )
    assert not blob.exists()
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST) as server:
        assert "retired the v3 delta" in server.log
        in_use = run("verify", "--state-dir", state, "--no-proof", "--heal", status=1)
        assert "by a server" in error_of(in_use)
        deltas_made(server)
    assert blob.stat().st_size == size
    assert states(verify_json(state, pair)) == ["proven"] * 4
    for log in state.parent.glob("*.log"):
        log.unlink()


def test_a_progress_bar_is_drawn_on_a_terminal(state: Path, pair: Pair) -> None:
    shown = on_terminal("verify", "--state-dir", state, "--upstream", f"oci:{pair.root}")
    assert b"hashing files" in shown
    assert b" 100% hashing files" in shown
    assert b"proving 4 of 4" in shown
    assert shown.endswith(CLEARED)


def test_an_interrupt_leaves_nothing(state: Path) -> None:
    for path in (state / "layers").iterdir():
        path.unlink()
    folder = state.parent / "folder"
    folder.mkdir()
    with (
        silent_server() as (url, requested),
        started(folder, "verify", "--state-dir", state, "--upstream", url) as process,
    ):
        requested.wait(60)
        assert_ended(process, signal.SIGINT)
    shutil.rmtree(folder)


def test_a_delta_to_another_target_is_found_though_its_files_are_good(
    state: Path, pair: Pair
) -> None:
    """Simulates a defect of the builder: the recorded base is not the one from which the delta was
    made.
    """
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue, catalogue:
        rows = catalogue.execute(
            "SELECT id, base, base_repository FROM deltas WHERE form = 'gzip' ORDER BY id"
        ).fetchall()
        (first, _, _), (_, other, other_repository) = rows
        catalogue.execute(
            "UPDATE deltas SET base = ?, base_repository = ? WHERE id = ?",
            (other, other_repository, first),
        )
    value = verify_json(state, pair, status=3)
    assert sorted(states(value)) == ["damaged", *["proven"] * 3]
    deltas = value["deltas"]
    assert isinstance(deltas, list)
    (wrong,) = [delta for delta in deltas if delta["state"] == "damaged"]
    assert wrong["problem"].startswith("label io.resin.delta.base has digest")
    removed = verify_json(state, pair, "--heal", status=3)["removed"]
    assert isinstance(removed, list) and len(removed) == 1
    with running_server(state, upstream=f"oci:{pair.root}", registry_hosts=HOST):
        value = verify_json(state, pair, "--no-fetch")
    for log in state.parent.glob("*.log"):
        log.unlink()
    assert states(value) == ["proven"] * 3


def test_evicted_layers_are_no_damage(state: Path, pair: Pair) -> None:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue, catalogue:
        catalogue.execute("UPDATE deltas SET created = 1, last_served = 1")
    run("gc", "--state-dir", state, "--free", "1 GiB")
    value = verify_json(state, pair)
    assert set(states(value)) <= {"evicted", "proven"}
    assert "evicted" in states(value)


def test_an_empty_and_a_missing_store(tmp_path: Path, pair: Pair) -> None:
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}"):
        pass
    assert normal(verify(tmp_path / "state", pair)).endswith(
        "files N hashed, N bytes, N damaged\ndeltas N"
    )
    none = run("verify", "--state-dir", tmp_path / "none", "--no-proof", status=1)
    assert f"there is none in {tmp_path}/none" in error_of(none)
    (tmp_path / "state/catalogue.sqlite").write_bytes(b"no database" * 1000)
    for leftover in (tmp_path / "state").glob("catalogue.sqlite-*"):
        leftover.unlink()
    assert "cannot be used" in error_of(
        run("verify", "--state-dir", tmp_path / "state", "--no-proof", status=1)
    )
    assert "setting upstream is missing" in error_of(
        run("verify", "--state-dir", tmp_path / "state", status=2)
    )


def test_a_reader_that_closes_the_pipe_is_no_error(state: Path, pair: Pair) -> None:
    command = [*OBDELTA, "verify", "--state-dir", str(state), "--no-proof"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)
