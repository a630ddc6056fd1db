"""A foreign directory loses nothing: neither if ``state-dir`` names it by mistake, nor if obdelta
shares it.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.app.components import open_state
from obdelta.concurrency.tasks import Threads
from obdelta.errors import SettingsError
from obdelta.store.ownership import CATALOGUE, MARKER, TEXT, claim, is_catalogue
from tests.support.fault_fleet import Tally
from tests.support.logs import logged
from tests.support.server import command, running_server
from tests.support.state_dirs import configured, contents, opened_and_closed
from tests.support.store import publish, runtime, threads

__all__ = ["threads"]

FOLDERS = 2
"""In each round, one directory is named by mistake, and obdelta is allowed to share another."""
HEX = "0123456789abcdef"
_OURS = ("tmp", "layers", "trees", "upstream", "blobs/sha256/ab", "blobs/sha256", "blobs")


def make_foreign(folder: Path, source: random.Random) -> None:
    """Fills a directory as other programs do, also under the names that obdelta uses."""
    outside = folder.parent / f"{folder.name}-outside"
    for place in (*_OURS, "log", "lib/app"):
        inner = folder / place
        inner.mkdir(parents=True, exist_ok=True)
        for number in range(source.randrange(1, 4)):
            (inner / f"file-{number}").write_bytes(source.randbytes(100))
        (inner / f"session-{source.randrange(1000)}" / "deep").mkdir(parents=True)
        (inner / "deep link").symlink_to(outside)
        (inner / "".join(source.choices(HEX, k=40))).write_bytes(b"a commit of git")
        (inner / ("".join(source.choices(HEX, k=64)) + ".json")).write_bytes(b"an image of docker")
    for _ in range(3):
        name = "ab" + "".join(source.choices(HEX, k=62))
        (folder / "blobs/sha256/ab" / name).write_bytes(source.randbytes(100))
    outside.mkdir()
    (outside / "precious").write_bytes(source.randbytes(100))
    for name in ("running-config", "running-1.bak", "catalogue.csv", "lost.txt"):
        (folder / name).write_bytes(source.randbytes(50))


def run_foreign_folders(directory: Path, count: int, tally: Tally, seed: int = 15) -> None:
    """Starts real servers on foreign directories; counts the earlier files that are missing
    afterwards.
    """
    source = random.Random(seed)
    for number in range(count):
        folder = directory / f"foreign-{number}"
        make_foreign(folder, source)
        before = contents(directory)
        refused = start(folder)
        assert refused.returncode == 2
        assert refused.stderr.count("obdelta cannot start: ") == 1
        assert f"run `touch {folder / MARKER}`" in refused.stderr, refused.stderr
        after = contents(directory)
        assert after == before
        tally.add("starts refused, nothing changed")
        tally.add("files compared", len(before))
        # An operator marks it as obdelta's: the server works there, and foreign files stay.
        (folder / MARKER).touch()
        (folder / "reserve").unlink(missing_ok=True)
        with running_server(
            folder, upstream="http://127.0.0.1:1", environment=None, port=None
        ) as server:
            assert "entries that obdelta did not make" in server.log
            assert server.log.count("blobs/ holds 3 files that no delta refers to") == 1
        lost = {path for path, held in before.items() if contents(directory).get(path) != held}
        tally.add("starts in a shared directory")
        tally.add("files compared", len(before))
        tally.add("files lost", len(lost))


def start(state: Path) -> subprocess.CompletedProcess[str]:
    """Runs a server that must refuse to start."""
    options = {"upstream": "http://127.0.0.1:1", "public-url": "http://127.0.0.1:1", "auth": "none"}
    options |= {"state-dir": str(state), "listen": "tcp:0:interface=127.0.0.1"}
    run = command(*(f"--{key}={value}" for key, value in options.items()))
    done = subprocess.run(
        run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    return subprocess.CompletedProcess(run, done.returncode, "", done.stdout)


def test_foreign_folders_are_not_changed(tmp_path: Path) -> None:
    tally = Tally()
    run_foreign_folders(tmp_path, FOLDERS, tally)
    tally.show()
    assert tally.counts["files lost"] == 0
    assert (
        tally.counts["starts refused, nothing changed"]
        == tally.counts["starts in a shared directory"]
        == FOLDERS
    )


@pytest.mark.parametrize(
    "name",
    ["tmp", "layers", "trees", "upstream", "blobs", "reserve", "lock", "catalogue.sqlite", "x"],
)
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    (state / name).mkdir(parents=True)
    (state / name / "precious").write_text("stays")
    before = contents(tmp_path)
    with pytest.raises(SettingsError) as refused:
        claim(state)
    assert (
        str(refused.value)
        == f"setting state-dir has the value '{state}': expected an empty directory, or one that"
        f" obdelta made; it holds {name}, and nothing was touched: name another directory, or run"
        f" `touch {state / MARKER}` if this one is obdelta's"
    )
    assert contents(tmp_path) == before


@pytest_twisted.ensureDeferred
async def test_empty_and_new_folders_get_the_marker(tmp_path: Path, threads: Threads) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "url-key").write_bytes(os.urandom(32))
    for name in ("empty", "disk", "key", "new", "further/down"):
        state = tmp_path / name
        with logged("info", "warn") as lines:
            await opened_and_closed(state, threads)
        assert (state / MARKER).read_bytes() == TEXT
        assert not any("older obdelta" in line for line in lines)
        assert ("other users may enter" in "".join(lines)) == (name in ("empty", "disk", "key"))
        await opened_and_closed(state, threads)
    assert (tmp_path / "further" / "down").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "disk" / "lost+found").is_dir()


@pytest_twisted.ensureDeferred
async def test_a_folder_of_an_older_obdelta_is_recognised_and_keeps_everything(
    tmp_path: Path, threads: Threads
) -> None:
    state = tmp_path / "state"
    process = runtime(configured(state), threads)
    opened = await open_state(process)
    row = await publish(opened.catalogue, opened.blobs, 1, int(time.time()))
    # As after a kill: the catalogue's first page is only in the write-ahead log.
    killed = tmp_path / "killed"
    shutil.copytree(state, killed)
    await process.services.stopService()
    for folder in (state, killed):
        (folder / MARKER).unlink()
        with logged("info") as lines:
            again = runtime(configured(folder), threads)
            found = await open_state(again)
            assert await found.catalogue.delta(row.key) == row
            await again.services.stopService()
        assert (folder / MARKER).read_bytes() == TEXT
        assert (
            lines[0]
            == f"state-dir {folder} was made by an older obdelta: it is marked with {MARKER} now"
        )


def test_a_new_catalogue_is_recognised_by_its_log(tmp_path: Path) -> None:
    path = tmp_path / CATALOGUE
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA application_id = {0x6F62646C}")
        connection.execute("CREATE TABLE deltas (id INTEGER)")
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    killed = tmp_path.with_name("killed")
    assert path.read_bytes()[68:72] == b"obdl"
    assert (killed / CATALOGUE).read_bytes()[68:72] != b"obdl"
    assert is_catalogue(killed / CATALOGUE)
    assert is_catalogue(path)


def test_foreign_catalogues_are_refused(tmp_path: Path) -> None:
    path = tmp_path / CATALOGUE
    assert not is_catalogue(path)
    os.mkfifo(path)
    assert not is_catalogue(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("PRAGMA application_id = 1")
        other.execute("CREATE TABLE t (x)")
    assert not is_catalogue(path)
    for log in (b"", b"\x37\x7f\x06\x82" + b"\0" * 60, os.urandom(5000)):
        path.with_name(f"{CATALOGUE}-wal").write_bytes(log)
        assert not is_catalogue(path)
    path.write_bytes(b"SQLite format 3\0")
    assert not is_catalogue(path)
    ours = tmp_path / "ours"
    ours.write_bytes(b"SQLite format 3\0".ljust(68, b"\0") + b"obdl")
    assert is_catalogue(ours)
    path.unlink()
    path.symlink_to(ours)
    assert not is_catalogue(path)
