"""Links and mounts in `state-dir`, and who may read its files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.concurrency.tasks import Threads
from obdelta.errors import SettingsError
from obdelta.store.ownership import MARKER, TEXT, claim, listing
from tests.support.server import running_server
from tests.support.state_dirs import contents, opened_and_closed
from tests.support.store import threads

__all__ = ["threads"]


@pytest.mark.parametrize(
    "name", ["tmp", "layers", "trees", "upstream", "blobs", "blobs/sha256", "reserve", "lock"]
)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    state, outside = tmp_path / "state", tmp_path / "outside"
    claim(state)
    (outside / ("0" * 24)).mkdir(parents=True)
    (state / name).parent.mkdir(exist_ok=True)
    (state / name).symlink_to(outside)
    before = contents(outside)
    with pytest.raises(SettingsError, match=f"a directory in which {name} is"):
        claim(state)
    assert contents(outside) == before


@pytest_twisted.ensureDeferred
async def test_a_shard_that_is_a_link_is_not_swept(tmp_path: Path, threads: Threads) -> None:
    state, outside = tmp_path / "state", tmp_path / "outside"
    await opened_and_closed(state, threads)
    outside.mkdir()
    names = ["ab" + "0" * 62, "cd" + "0" * 62]
    for name in names:
        (outside / name).write_bytes(b"somebody else's")
        (state / "layers" / f"{name}.tar").symlink_to(outside / name)
        (state / "trees" / name).symlink_to(outside)
    (state / "blobs" / "sha256" / "ab").symlink_to(outside)
    (state / "blobs" / "sha256" / "0f").mkdir()
    (state / "blobs" / "sha256" / "0f" / names[0]).write_bytes(b"not in its place")
    # As after an OS crash: all files are verified.
    (state / "running-1").write_bytes(b"another boot\n")
    os.utime(state / "running-1", (1000, 1000))
    await opened_and_closed(state, threads)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == dict.fromkeys(
        names, b"somebody else's"
    )
    assert (state / "blobs" / "sha256" / "0f" / names[0]).exists()


@pytest.mark.parametrize("kind", ["link", "folder", "text"])
def test_an_invalid_marker_is_refused(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / MARKER
    if kind == "link":
        marker.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        marker.mkdir()
    else:
        marker.write_text("of another program\n")
    with pytest.raises(SettingsError, match="is something else"):
        claim(tmp_path)
    assert marker.is_symlink() or marker.exists()


def test_a_truncated_marker_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for size in (0, 7, len(TEXT)):
        (tmp_path / MARKER).write_bytes(TEXT[:size])
        assert not claim(tmp_path).marked


def test_only_the_servers_user_can_access_its_files(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(
        state, upstream="http://127.0.0.1:1", environment=None, port=None
    ) as server:
        assert "other users may enter" not in server.log
        open_to_others = [
            path for path in (state, *state.rglob("*")) if path.lstat().st_mode & 0o077
        ]
        assert open_to_others == []


MOUNTED = """
import pathlib, subprocess, sys
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.caches.digest_caches import TreeCache
from tests.support.store import real_threads

state, foreign = map(pathlib.Path, sys.argv[1:])
with real_threads() as threads:
    blobs = BlobStore(state, threads)
    trees = TreeCache(state, threads)
    ours, above, itself, one = (blobs.tmp / (2 * digit * 6) for digit in ("ab", "cd", "ef", "01"))
    tree, gone = (state / "trees" / (2 * digit * 16) for digit in ("ab", "cd"))
    for folder in (ours, above / "a b" / "root", itself, tree / "root", gone / "root"):
        folder.mkdir(parents=True)
    one.touch()
    for point in (above / "a b" / "root", itself, tree / "root"):
        subprocess.run(["mount", "--bind", foreign, point], check=True)
    subprocess.run(["mount", "--bind", foreign / "file", one], check=True)
    removed, left = blobs._sweep()
    assert removed == [ours.name], removed
    assert left == sorted([above.name, itself.name, one.name]), left
    assert not files.remove(above)
    entries, _, left = trees._scan()
    assert (list(entries), left) == ([gone.name], [tree.name]), (list(entries), left)
    files.MOUNTS = state / "missing"
    subprocess.run(["mount", "-t", "tmpfs", "none", itself], check=True)
    assert not files.remove(itself)
"""


def test_a_mount_below_our_names_stays_and_is_named(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "folder").mkdir(parents=True)
    (foreign / "file").write_text("precious")
    state = tmp_path / "a state"
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    command_ = [*namespace, sys.executable, "-c", MOUNTED, str(state), str(foreign)]
    done = subprocess.run(command_, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (foreign / "file").read_text() == "precious"
    assert (foreign / "folder").is_dir()


@pytest_twisted.ensureDeferred
async def test_a_failed_removal_at_a_start_is_one_clear_line(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    await opened_and_closed(state, threads)
    left = state / "tmp" / ("ab" * 12)
    left.mkdir()

    def busy(path: Path) -> bool:
        # Replaces a file system that refuses; which ones refuse root differs.
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr("obdelta.store.files.remove", busy)
    with pytest.raises(SettingsError) as failure:
        await opened_and_closed(state, threads)
    text = str(failure.value)
    assert "setting state-dir" in text
    assert f"Device or resource busy: '{left}'" in text
    assert "\n" not in text
    monkeypatch.undo()
    await opened_and_closed(state, threads)
    assert not left.exists()


def test_names_in_a_log_line_are_escaped() -> None:
    assert listing(["b", "a\nfake line", "ü"]) == r"'a\nfake line', b, '\xfc'"
    assert listing(map(str, range(12))) == "0, 1, 10, 11, 2, 3, 4, 5, 6, 7 and 2 more"
