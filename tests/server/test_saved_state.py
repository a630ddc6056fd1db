"""A server opens the state of an earlier version: nothing that it holds is lost.

``tests/data/state-0.1`` was written by the server of commit ceb1a87. It had served the two images
of :func:`tests.support.images.make_pair` (``size=8192, compression="plain"``): a v3 and a v2 delta,
once each, and a v3 delta in the other direction that was too large with ``worth = 0.0001``.
``catalogue.sql`` is SQLite's dump of its catalogue, ``blobs/`` holds its blobs by digest.
"""

from __future__ import annotations

import http.client
import json
import shutil
import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from obdelta.builds.rsync_v2 import V2_RECIPE
from obdelta.delta.build import RECIPE
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Digest, Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server

SAVED = Path(__file__).parents[1] / "data/state-0.1"
SAVED_AT = 1_796_039_070
"""Seconds UTC, just after the last time in the catalogue."""
TIMES = {"deltas": ("created", "last_served"), "failures": ("last",), "asked": ("last",)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "images", size=8192, compression="plain")


def rows(state: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as catalogue:
        return catalogue.execute(statement).fetchall()


@pytest.fixture
def state(tmp_path: Path, pair: Pair) -> Iterator[Path]:
    """Returns the saved state as it would be a moment after it was written, with caches and
    leftovers.
    """
    folder = tmp_path / "state"
    for blob in (SAVED / "blobs").iterdir():
        place = folder / "blobs/sha256" / blob.name[:2] / blob.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(blob, place)
    shift = int(time.time()) - SAVED_AT
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as catalogue:
        catalogue.executescript((SAVED / "catalogue.sql").read_text("utf-8"))
        for table, columns in TIMES.items():
            for column in columns:
                catalogue.execute(f"UPDATE {table} SET {column} = {column} + {shift}")
        # Later builds make other bytes; this is a test of the state, not of them.
        catalogue.execute("UPDATE deltas SET recipe = ? WHERE kind = 'v3'", (RECIPE,))
        catalogue.execute("UPDATE deltas SET recipe = ? WHERE kind = 'v2'", (V2_RECIPE,))
        catalogue.execute("UPDATE failures SET recipe = ?", (RECIPE,))
        catalogue.commit()
    (folder / ".obdelta-state").write_text(
        "This folder belongs to obdelta (setting state-dir):"
        " it removes what it no longer needs here.\n"
    )
    (folder / "url-key").write_bytes(bytes(range(32)))
    for layer in pair.base.layers:
        # These layers are not compressed: blob and tar are the same bytes.
        for name in (f"layers/{layer.digest.hex}.tar", f"upstream/{layer.digest.hex}.blob"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(layer.path, folder / name)
    (folder / f"layers/{'0' * 64}.idx").write_bytes(b"an index without its layer")
    (folder / "tmp").mkdir()
    (folder / "tmp" / ("ab" * 12)).write_bytes(b"a download that a kill ended")
    orphan = b"a layer that no delta needs"
    place = folder / "blobs/sha256" / Digest.of(orphan).hex[:2] / Digest.of(orphan).hex
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(orphan)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    yield folder


def ask(server: RunningServer, version: int, source: str, target: str) -> tuple[int, str, bytes]:
    """Returns status, Location and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with closing(connection):
        connection.request("GET", f"/api/v{version}/delta?src={source}&dest={target}")
        answer = connection.getresponse()
        return answer.status, answer.getheader("Location", ""), answer.read()


def names(server: RunningServer) -> tuple[str, str]:
    return f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"


def test_deltas_of_an_earlier_version_are_served(pair: Pair, state: Path, tmp_path: Path) -> None:
    made = rows(state, "SELECT kind, created, tag FROM deltas ORDER BY kind")
    batch = rows(state, "SELECT content FROM deltas WHERE kind = 'v2'")[0][0]
    assert [kind for kind, *_ in made] == ["v2", "v3"]
    with running_server(state, upstream=f"oci:{pair.root}", max_delta_ratio="10") as server:
        base, target = names(server)
        client = Http(timeout=30)
        device = Device(client, Engine(client, registry=server.url), server.url)
        (tmp_path / "device").mkdir()
        loaded = device.load_base(Reference.parse(base), tmp_path / "device")
        assert device.update(loaded, base, target, tmp_path / "device").is_delta
        status, location, _ = ask(server, 2, base, target)
        assert status == 300
        with urllib.request.urlopen(location, timeout=30) as download:
            assert Digest.of(download.read()).hex == batch
    # They were not built again.
    assert rows(state, "SELECT kind, created, tag FROM deltas ORDER BY kind") == made
    assert rows(state, "SELECT kind, served FROM deltas ORDER BY kind") == [("v2", 2), ("v3", 2)]


def test_failures_and_counters_of_an_earlier_version_are_kept(pair: Pair, state: Path) -> None:
    before = dict(rows(state, "SELECT name, value FROM counters"))
    assert before["served.v2.deltas"] == before["served.v3.deltas"] == 1
    with running_server(state, upstream=f"oci:{pair.root}") as server:
        base, target = names(server)
        status, _, body = ask(server, 3, target, base)
        assert (status, json.loads(body)) == (200, {"name": base})
    after = dict(rows(state, "SELECT name, value FROM counters"))
    # The same verdict, without another build.
    assert after == {**before, "full_pull.not-worth": 2}
    assert rows(state, "SELECT outcome, count FROM failures") == [("not worth", 1)]


def test_caches_of_an_earlier_version_are_adopted_and_leftovers_removed(
    pair: Pair, state: Path
) -> None:
    layers = sorted(f"{layer.digest.hex}.tar" for layer in pair.base.layers)
    with (
        running_server(state, upstream=f"oci:{pair.root}") as server,
        urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=30) as answer,
    ):
        metrics = answer.read().decode()
    for kind in ("deltas", "layers", "upstream"):
        (line,) = [
            line
            for line in metrics.splitlines()
            if line.startswith(f'obdelta_store_bytes{{kind="{kind}"}}')
        ]
        assert float(line.split()[1]) > 0
    assert sorted(path.name for path in (state / "layers").iterdir()) == layers
    assert not list((state / "tmp").iterdir())
    stored = {path.name for path in (state / "blobs/sha256").rglob("*") if path.is_file()}
    assert stored >= {path.name for path in (SAVED / "blobs").iterdir()}
    assert Digest.of(b"a layer that no delta needs").hex not in stored
