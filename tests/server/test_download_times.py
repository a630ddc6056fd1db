"""The time that devices take is measured where it is meaningful, in every server process."""

from __future__ import annotations

import json
import random
import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from bench.images import file, make_image, make_layer, push
from obdelta.builds import device_estimates
from obdelta.delta.effort import DEFAULT_PRICES, PRICE_SHARE
from obdelta.device.update import AGENTS as SUPERVISORS
from obdelta.oci import Form, Reference
from obdelta.oci.manifest import ACCEPT
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.processes import until
from tests.support.registry import running_registry
from tests.support.server import RunningServer, running_server

ENGINE_20 = "balenaEngine/20.10.44 go/go1.19 git-commit/abc kernel/6.6 os/linux arch/arm64"
ENGINE_25 = "balenaEngine/25.0.14 go/go1.24 git-commit/abc kernel/6.6 os/linux arch/arm64"
NEXT_REPOSITORY = "v2/" + "c3" * 16
NEW_BYTES = 4 << 20
"""Bytes of the target: much more than sockets buffer."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Returns a registry with base and target; the delta has one layer of new bytes, and one with
    many commands.
    """
    work, source = tmp_path_factory.mktemp("pair"), random.Random(1)
    known, new, more = (source.randbytes(NEW_BYTES) for _ in range(3))
    mixed = b"".join(
        known[at : at + 2048] + more[at : at + 2048] for at in range(0, NEW_BYTES, 2048)
    )
    layers = [
        make_layer([file(name, content)], work / "blobs")
        for name, content in (("known", known), ("new", new), ("mixed", mixed))
    ]
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(make_image(layers[:1], work / "base"), running.url, BASE_REPOSITORY)
        push(make_image(layers[1:], work / "target"), running.url, TARGET_REPOSITORY)
        later = make_layer([file("mixed", mixed[: NEW_BYTES // 2])], work / "blobs")
        push(make_image([layers[1], later], work / "next"), running.url, NEXT_REPOSITORY)
        yield running.url


def manifest(server: RunningServer, repository: str, reference: str) -> list[dict[str, Any]]:
    """Returns a manifest with the layers of an image."""
    request = urllib.request.Request(
        f"{server.url}/v2/{repository}/manifests/{reference}", headers={"Accept": ", ".join(ACCEPT)}
    )
    with urllib.request.urlopen(request) as answer:
        layers: list[dict[str, Any]] = json.load(answer)["layers"]
    return layers


def delta_between(server: RunningServer, base: str, target: str) -> Reference:
    """Has a delta built; returns its name."""
    names = f"src={server.host}/{base}&dest={server.host}/{target}"
    url = f"{server.url}/api/v3/delta?{names}&wait=true"
    request = urllib.request.Request(url, headers={"User-Agent": SUPERVISORS[Form.GZIP]})
    with urllib.request.urlopen(request) as answer:
        return Reference.parse(json.load(answer)["name"])


def delta_layers(server: RunningServer) -> list[str]:
    """Has the delta built; returns the digests of its layers."""
    name = delta_between(server, BASE_REPOSITORY, TARGET_REPOSITORY)
    layers = manifest(server, name.repository, str(name.tag))
    assert all(layer["size"] > NEW_BYTES for layer in layers)
    return [layer["digest"] for layer in layers]


def download(
    server: RunningServer, digest: str, device: int, user_agent: str, **headers: str
) -> None:
    """Downloads as a device with its own address, which pauses after every piece."""
    with closing(
        HTTPConnection(
            "127.0.0.1", server.port, timeout=60, source_address=(f"127.0.1.{device}", 0)
        )
    ) as connection:
        path = f"/v2/{TARGET_REPOSITORY}/blobs/{digest}"
        connection.request("GET", path, headers={"User-Agent": user_agent, **headers})
        answer = connection.getresponse()
        assert answer.status in (200, 206)
        while answer.read(1 << 16):
            time.sleep(0.02)


def rows(
    server: RunningServer, query: str = "SELECT engine, size FROM device_downloads ORDER BY engine"
) -> list[Any]:
    """Returns rows of the catalogue: by default engine and size of each recorded download."""
    path = f"file:{server.state_dir / 'catalogue.sqlite'}?mode=ro"
    with closing(sqlite3.connect(path, uri=True)) as connection:
        return connection.execute(query).fetchall()


def measure(server: RunningServer, digest: str, device: int, user_agent: str) -> None:
    """Downloads until a download is recorded: if the machine stops in between, none is."""
    before = len(rows(server))

    def recorded() -> bool:
        download(server, digest, device, user_agent)
        return len(rows(server)) > before

    until("a download is recorded", recorded)


@pytest.mark.parametrize("processes", ["1", "3"])
def test_complete_downloads_are_recorded_for_their_fleet(
    registry: str, tmp_path: Path, processes: str
) -> None:
    module = device_estimates.__name__
    with running_server(
        tmp_path / "state",
        upstream=registry,
        processes=processes,
        device_link="auto",
        constants={f"{module}.MIN_DEVICES": 1, f"{module}.KEPT_SECONDS": 0},
    ) as server:
        layers = delta_layers(server)
        full = manifest(server, TARGET_REPOSITORY, "latest")[0]["digest"]
        download(server, layers[0], 2, ENGINE_25, Range="bytes=100-")
        download(server, layers[0], 3, "skopeo/1.9.3")
        download(server, full, 4, ENGINE_25)
        download(server, full, 4, ENGINE_25)
        assert rows(server) == []
        measure(server, layers[0], 5, ENGINE_25)
        measure(server, layers[1], 5, ENGINE_25)
        measure(server, layers[0], 6, ENGINE_20)
        assert [engine for engine, _ in rows(server)] == ["gzip", "zstd", "zstd"]
        with urllib.request.urlopen(f"{server.operator_url}/api/v1/status") as answer:
            (fleet,) = json.load(answer)["fleets"]
        assert (fleet["repository"], fleet["reads"], fleet["devices"]) == (
            TARGET_REPOSITORY,
            "zstd",
            1,
        )
        with urllib.request.urlopen(f"{server.operator_url}/metrics") as answer:
            metrics = answer.read().decode()
        delta_between(server, TARGET_REPOSITORY, NEXT_REPOSITORY)
        first, following = (
            json.loads(details)["prices"]
            for (details,) in rows(
                server, "SELECT details FROM deltas WHERE form = 'gzip' ORDER BY id"
            )
        )
        assert first == {form.value: price for form, price in DEFAULT_PRICES.items()}
        arriving = fleet["command_microseconds"] * fleet["link_bits_per_second"] / 8e6
        assert following["zstd"] == pytest.approx(PRICE_SHARE * arriving) != first["zstd"]
    assert 'obdelta_measured_devices{reads="zstd"} 1.0' in metrics
    assert 'obdelta_measured_devices{reads="gzip"} 0.0' in metrics
    assert 'obdelta_device_link_bytes_per_second{reads="zstd"}' in metrics
