"""A disk that changes bytes of what is cached: builds that meet them go on with what is fetched anew, and no device notices."""

from __future__ import annotations

from pathlib import Path

from bench.registry import serving
from obdelta.oci import Digest
from obdelta.store import disk
from tests.parts.fault_fleet import Fleet, make_fleet, until_tidy
from tests.parts.server import running_server
from tests.test_faults_workers import counters


def damage(directory: Path, suffix: str) -> int:
    """Flips a bit in the middle of each file; gives back how many."""
    files = sorted(directory.glob(f"*{suffix}"))
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return len(files)


def wrong(directory: Path, suffix: str) -> int:
    """How many files are not what they are called."""
    return sum(disk.digest_of(path) != Digest(path.stem) for path in directory.glob(f"*{suffix}"))


def test_damaged_caches_are_not_believed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 3)
        fleet = Fleet(registry)
        options = {"effort": "fast", "worth": "10"}
        with running_server(state, upstream=registry, environment=None, port=None, **options) as server:  # type: ignore[arg-type]
            assert fleet.update(server.url, 0).is_delta
        assert damage(state / "layers", ".tar") == 5
        assert damage(state / "upstream", ".blob") == 5
        # The target of this pair was cached: its proof fails, its layers are inflated again, from blobs that are fetched again.
        with running_server(state, upstream=registry, environment=None, port=None, **options) as server:  # type: ignore[arg-type]
            assert fleet.update(server.url, 2, step=-1).is_delta
            until_tidy(state, server.operator_url)
    assert counters(state)["build.retried"] == 1
    # Those of image 0 were not needed.
    assert [wrong(state / "layers", ".tar"), wrong(state / "upstream", ".blob")] == [2, 2]
