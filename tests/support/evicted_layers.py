"""Requests for deltas whose layers were evicted, and a registry with a pair of images."""

from __future__ import annotations

import json
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.images import push
from bench.registry import serving
from obdelta.device.http import Http
from obdelta.device.pull import AGENTS
from obdelta.device.update import AGENTS as SUPERVISORS
from obdelta.device.update import device_for
from obdelta.oci import Form, Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=8 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("registry")) as url:
        push(pair.base, url, BASE_REPOSITORY)
        push(pair.target, url, TARGET_REPOSITORY)
        yield url


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return bytes(answer.read())


def ask(server: RunningServer, form: Form = Form.GZIP) -> str:
    url = (
        f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
        f"&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    )
    return str(json.loads(get(url, **{"user-agent": SUPERVISORS[form]}))["name"])


def manifest_of(server: RunningServer, name: str, form: Form = Form.GZIP) -> dict[str, object]:
    url = f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/{name.rpartition(':')[2]}"
    found: dict[str, object] = json.loads(get(url, **{"user-agent": AGENTS[form]}))
    return found


def large_layers(manifest: dict[str, object]) -> list[tuple[str, int]]:
    layers: list[dict[str, object]] = manifest["layers"]  # type: ignore[assignment]
    return [
        (str(layer["digest"]), int(str(layer["size"])))
        for layer in layers
        if int(str(layer["size"])) > 4096
    ]


def path_of(state: Path, digest: str) -> Path:
    hex_ = digest.partition(":")[2]
    return state / "blobs" / "sha256" / hex_[:2] / hex_


def update(server: RunningServer, work: Path, form: Form = Form.GZIP) -> bool:
    work.mkdir()
    device = device_for(form, server.url, registry=server.url, http=Http(timeout=60))
    base, target = f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"
    return device.update(device.load_base(Reference.parse(base), work), base, target, work).is_delta


def change(state: Path, sql: str) -> None:
    with sqlite3.connect(state / "catalogue.sqlite") as connection:
        connection.execute(sql)
    connection.close()
