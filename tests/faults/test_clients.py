"""Devices that leave, stall and resume at random offsets, in content that is finished, being
fetched, or being rebuilt.

The bytes that a device ends with have the digest that it requested.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import socket
import struct
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from bench.images import push
from bench.registry import serving
from tests.support.fault_fleet import Tally, WrongBytes, check_store, evict_layers, until_tidy
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.server import RunningServer, running_server

DEVICES = 12
SEED = 63
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close() resets the connection."""


class Impatient:
    """One device; ``path`` is a blob of ``size`` bytes, by the digest in its name."""

    def __init__(self, server: str, path: str, size: int, seed: int, tally: Tally) -> None:
        self._address = urlsplit(server).netloc
        self._path, self._size, self._tally = path, size, tally
        self._random = random.Random(seed)
        self.stalled: list[http.client.HTTPConnection] = []

    def download_all(self) -> None:
        """Downloads the whole blob in pieces; raises WrongBytes."""
        content = bytearray()
        while len(content) < self._size:
            most = self._random.choice((1, self._random.randrange(1, self._size + 1), self._size))
            self._read(content, most)
            if not self._random.randrange(3):
                self._stall(self._random.randrange(self._size))
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != self._path.rpartition("/")[2]:
            raise WrongBytes(f"{self._path} was put together of other bytes")
        self._tally.add("blobs downloaded completely and verified")

    def _read(self, content: bytearray, most: int) -> None:
        """Resumes, reads up to ``most`` bytes, and disconnects, with a reset or without one."""
        connection = self._request_from(len(content))
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            response = connection.getresponse()
            if response.status not in (200, 206):
                self._tally.add("answers after which a device retries")
                return
            if content:
                expected = f"bytes {len(content)}-{self._size - 1}/{self._size}"
                if response.status != 206 or response.headers["content-range"] != expected:
                    raise WrongBytes(
                        f"{response.status} {response.headers['content-range']}, expected"
                        f" {expected}"
                    )
                self._tally.add("downloads resumed")
            while most and (piece := response.read(min(most, 8192))):
                content += piece
                most -= len(piece)
            if len(content) < self._size:
                self._tally.add("downloads cut by the device")
                if self._random.randrange(2) and connection.sock is not None:
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _stall(self, start: int) -> None:
        """Sends a request, and never reads."""
        connection = self._request_from(start)
        self.stalled.append(connection)
        self._tally.add("stalled")

    def _request_from(self, start: int) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        connection.request("GET", self._path, headers={"Range": f"bytes={start}-"} if start else {})
        return connection


def run_devices(
    server: RunningServer, blobs: list[tuple[str, int]], devices: int, seed: int, tally: Tally
) -> None:
    """Runs this number of devices at once, which download all of these blobs."""
    all_of_them = [
        Impatient(server.url, *blobs[number % len(blobs)], seed + number, tally)
        for number in range(devices)
    ]
    try:
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(device.download_all) for device in all_of_them]:
                done.result()
    finally:
        for device in all_of_them:
            for connection in device.stalled:
                connection.close()


def run_clients(directory: Path, devices: int, tally: Tally, seed: int = SEED) -> None:
    """Downloads blobs of the upstream, a finished delta, and a delta whose layers are evicted
    repeatedly.
    """
    state = directory / "state"
    pair = make_pair(directory / "pair", size=8 << 20)
    with serving(directory / "registry") as registry:
        push(pair.base, registry, BASE_REPOSITORY)
        push(pair.target, registry, TARGET_REPOSITORY)
        with running_server(
            state, upstream=registry, max_requests="0", max_connections="0"
        ) as server:
            upstream = [
                (f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}", layer.size)
                for layer in pair.target.layers
            ]
            large = sorted(upstream, key=lambda blob: -blob[1])[:3]
            run_devices(server, large, devices, seed, tally)
            delta = delta_blobs(server)
            run_devices(server, delta, devices, seed + 1000, tally)
            until_tidy(state, server.operator_url)
        options = {
            "store_quota": "1",
            "keep_served": "0",
            "max_requests": "0",
            "max_connections": "0",
        }
        with running_server(
            state,
            upstream=registry,
            environment=None,
            port=None,
            **options,  # type: ignore[arg-type]
        ) as server:
            for turn in range(4):
                evict_layers(server.state_dir, server.operator_url)
                run_devices(server, delta, devices // 4, seed + 2000 + 100 * turn, tally)
            until_tidy(state, server.operator_url)
            assert delta_blobs(server) == delta
    tally.add("files compared with their digests", check_store(state))


def delta_blobs(server: RunningServer) -> list[tuple[str, int]]:
    """Returns the large layers of the pair's delta."""
    ask = (
        f"{server.url}/api/v3/delta?src={server.host}/{BASE_REPOSITORY}"
        f"&dest={server.host}/{TARGET_REPOSITORY}&wait=true"
    )
    with urllib.request.urlopen(ask, timeout=60) as answer:
        tag = json.loads(answer.read())["name"].rpartition(":")[2]
    with urllib.request.urlopen(
        f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/{tag}", timeout=60
    ) as answer:
        layers = json.loads(answer.read())["layers"]
    return [
        (f"/v2/{TARGET_REPOSITORY}/blobs/{layer['digest']}", layer["size"])
        for layer in layers
        if layer["size"] > 4096
    ]


def test_devices_that_leave_stall_and_resume(tmp_path: Path) -> None:
    tally = Tally()
    run_clients(tmp_path, DEVICES, tally)
    tally.show()
    assert tally.counts["blobs downloaded completely and verified"] == 3 * DEVICES
    assert tally.counts["downloads resumed"] > DEVICES
    assert tally.counts["stalled"] > DEVICES
