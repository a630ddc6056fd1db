"""Damage to the state: changed bytes on the disk, and files and directories that are removed while
the server runs.

Builds that find damage fetch or rebuild the content, and no device notices.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bench.registry import serving
from obdelta.device.http import ServerFault
from obdelta.oci import Digest
from obdelta.store import files
from tests.faults.test_disk import fetch_batch, server_on_a_small_disk
from tests.faults.test_workers import counters
from tests.support.fault_fleet import (
    Fleet,
    Tally,
    check_store,
    evict_layers,
    make_fleet,
    repository,
    until_ready,
    until_tidy,
)
from tests.support.server import running_server


def damage(directory: Path, suffix: str) -> int:
    """Flips a bit in the middle of each file; returns how many."""
    files = sorted(directory.glob(f"*{suffix}"))
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return len(files)


def wrong(directory: Path, suffix: str) -> int:
    """Returns how many files do not have the digest in their name."""
    return sum(files.digest_of(path) != Digest(path.stem) for path in directory.glob(f"*{suffix}"))


def test_damaged_caches_are_not_believed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 3)
        fleet = Fleet(registry)
        options = {"effort": "fast", "max_delta_ratio": "10"}
        with running_server(
            state,
            upstream=registry,
            environment=None,
            port=None,
            **options,  # type: ignore[arg-type]
        ) as server:
            assert fleet.update(server.url, 0).is_delta
        assert damage(state / "layers", ".tar") == 5
        assert damage(state / "upstream", ".blob") == 5
        # The target of this pair was cached: its proof fails, and its layers are inflated again,
        # from blobs that are fetched again.
        with running_server(
            state,
            upstream=registry,
            environment=None,
            port=None,
            **options,  # type: ignore[arg-type]
        ) as server:
            assert fleet.update(server.url, 2, step=-1).is_delta
            until_tidy(state, server.operator_url)
    assert counters(state)["build.retried"] == 1
    # Those of image 0 were not needed.
    assert [wrong(state / "layers", ".tar"), wrong(state / "upstream", ".blob")] == [2, 2]


OPTIONS = {"effort": "fast", "max_delta_ratio": "10", "delta_compression": "gzip"}
FOLDERS = ("tmp", "layers", "trees", "upstream", "blobs")


def test_folders_removed_at_run_time_are_created_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, len(FOLDERS) + 3)
        fleet = Fleet(registry)
        with running_server(
            state,
            upstream=registry,
            environment=None,
            port=None,
            **OPTIONS,  # type: ignore[arg-type]
        ) as server:
            assert fleet.update(server.url, 0).is_delta
            for number, name in enumerate(FOLDERS):
                shutil.rmtree(state / name)
                # One delta is known, and one is not.
                assert fleet.update(server.url, number).is_delta, name
                assert fleet.update(server.url, number + 1).is_delta, name
                fetch_batch(server.url, number)
                until_tidy(state, server.operator_url)
            for name in FOLDERS:
                shutil.rmtree(state / name)
            # Readiness creates them again, too.
            until_ready(server.operator_url, 200)
            time.sleep(5.1)  # a result is cached for five seconds
            until_ready(server.operator_url, 200)
            assert all((state / name).is_dir() for name in FOLDERS)
            assert fleet.update(server.url, len(FOLDERS) + 1).is_delta
            shutil.rmtree(state / "trees")
            (state / "trees").touch()
            assert "trees/ in state-dir cannot be used" in until_ready(server.operator_url, 503)
            (state / "trees").unlink()
            until_ready(server.operator_url, 200)
            (state / "lock").rename(tmp_path / "lock")
            assert "lock was removed from state-dir" in until_ready(server.operator_url, 503)
            (tmp_path / "lock").rename(state / "lock")
            until_ready(server.operator_url, 200)
            (state / "catalogue.sqlite").unlink()
            assert "catalogue.sqlite was removed" in until_ready(server.operator_url, 503)
            assert "Traceback" not in server.log
            assert "unexpected error" not in server.log


def test_a_blob_removed_at_run_time_is_rebuilt(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        fleet = Fleet(registry)
        with running_server(
            state,
            upstream=registry,
            environment=None,
            port=None,
            **OPTIONS,  # type: ignore[arg-type]
        ) as server:
            assert fleet.update(server.url, 0).is_delta
            # The answer to a v2 device that cannot have a delta.
            full_pull = fetch(f"{server.url}/api/v2/delta/download?full-pull=yes")
            (kept,) = (state / "blobs").rglob(Digest.of(full_pull).hex)
            kept.unlink()
            assert fetch(f"{server.url}/api/v2/delta/download?full-pull=yes") == full_pull
            for path in [
                path for path in (state / "blobs").rglob("*") if path.is_file() and path != kept
            ]:
                content = path.read_bytes()
                # Each blob in turn (config, the empty layer, layers) is removed, then truncated.
                path.unlink()
                assert fleet.update(server.url, 0).is_delta
                assert path.read_bytes() == content
                path.write_bytes(content[:-1])
                assert fleet.update(server.url, 0).is_delta
                assert path.read_bytes() == content
            assert "Traceback" not in server.log


def test_a_file_system_without_inodes(tmp_path: Path) -> None:
    """There are enough bytes: content that cannot be stored is proxied, builds fail cleanly, and
    work continues when there is space.
    """
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 4)
        fleet = Fleet(registry)
        with server_on_a_small_disk(tmp_path, registry, 64, inodes=400) as small:
            assert fleet.update(small.url, 0).is_delta
            until_tidy(small.state, small.operators)
            evict_layers(small.state, small.operators)
            ballast = fill_inodes(small.state)
            # A blob of the upstream is still served.
            manifest = json.loads(fetch(f"{registry}/v2/{repository(2)}/manifests/latest"))
            for layer in manifest["layers"]:
                path = f"/v2/{repository(2)}/blobs/{layer['digest']}"
                assert fetch(small.url + path) == fetch(registry + path)
            with pytest.raises((ServerFault, OSError)):
                fleet.update(small.url, 2, deadline=0)
            assert "no inode is left" in until_ready(small.operators, 503)
            until_tidy(small.state, small.operators)
            shutil.rmtree(ballast)
            until_ready(small.operators, 200)
            assert fleet.update_again(small.url, 2, 10, Tally()).is_delta
            until_tidy(small.state, small.operators)
            assert "Traceback" not in small.log.read_text()
            check_store(small.state)


def fetch(url: str) -> bytes:
    accept = "application/vnd.docker.distribution.manifest.v2+json"
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"accept": accept}), timeout=60
    ) as answer:
        return bytes(answer.read())


def fill_inodes(state: Path) -> Path:
    """Creates empty files until the file system has no inode left."""
    ballast = state / "ballast"
    ballast.mkdir()
    number = 0
    try:
        while True:
            (ballast / str(number)).touch()
            number += 1
    except OSError:
        return ballast
