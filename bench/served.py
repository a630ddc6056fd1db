"""The running obdelta: ``twistd obdelta`` before a real registry, timed from a device's request to
the published manifest.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import images, peer
from bench.corpus import CACHE, Pair
from bench.direct import memory
from bench.images import Image
from obdelta.oci.digest import Digest
from obdelta.oci.manifest import DOCKER_MANIFEST

_START_SECONDS = 30
_SAMPLE_SECONDS = 0.02
_REST_SECONDS, _REST_SAMPLES, _AT_REST = 0.15, 3, 0.2
"""A server is at rest if it and its workers used less than this share of a core, in this many
intervals of this many seconds.
"""


@dataclass(frozen=True, slots=True)
class Served:
    """Wall seconds with an empty state directory (``cold``) and with the base's layers and indexes
    in it (``indexed``); bytes of the delta image's layers; peaks of resident memory, in bytes.

    ``worker_peak`` counts pages of mapped files, ``worker_anonymous`` (sampled) does not; both are
    of the largest worker.
    """

    cold: float
    indexed: float
    layer_sizes: list[int]
    worker_peak: int
    worker_anonymous: int
    proxy_peak: int


def measure(pair: Pair, registry: str, base: Path, scratch: Path, *, effort: str) -> Served:
    """Runs the server twice on fresh state directories; ``base`` is the concatenated base, for the
    proof by rdiff.
    """
    names = {
        side: f"{registry.removeprefix('http://')}/{pair.repository(side)}"
        for side in ("base", "target", "other")
    }
    other = other_release(pair, scratch)
    for side, image in (("base", pair.base), ("target", pair.target), ("other", other)):
        names[side] += f"@{images.push(image, registry, pair.repository(side), 'latest')}"
    with running(registry, scratch / "state", effort) as (address, watch):
        cold, name = _timed(address, names["base"], names["target"])
        sizes = _fetch_and_prove(address, name, pair, base, scratch)
    with running(registry, scratch / "state", effort) as (address, _):
        _timed(address, names["base"], names["other"])
        indexed, _name = _timed(address, names["base"], names["target"])
    return Served(cold, indexed, sizes, watch.worker_peak, watch.worker_anonymous, watch.proxy_peak)


def other_release(pair: Pair, scratch: Path) -> Image:
    """Makes a release from the base and a little more: its delta makes obdelta read and index the
    whole base, but nothing of the target.
    """
    noise = b"".join(Digest.of(str(number).encode()).hex.encode() for number in range(2000))
    layer = images.make_layer([images.file("var/other", noise)], scratch / "other-blobs")
    return images.make_image([*pair.base.layers, layer], scratch / "other")


class _Watch:
    """Samples the memory of a server and its workers until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.worker_peak = self.worker_anonymous = self.proxy_peak = 0
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.proxy_peak = max(self.proxy_peak, memory(self._pid, "VmHWM"))
            for worker in _children(self._pid):
                self.worker_peak = max(self.worker_peak, memory(worker, "VmHWM"))
                self.worker_anonymous = max(self.worker_anonymous, memory(worker, "RssAnon"))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, listing.read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


@contextmanager
def running(registry: str, state: Path, effort: str) -> Iterator[tuple[str, _Watch]]:
    """Yields ``host:port`` of a server with an empty state directory, and its watch; stops it and
    removes the state.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = {
        "listen": f"tcp:{address.rpartition(':')[2]}:interface=127.0.0.1",
        "upstream": registry,
        "public-url": f"http://{address}",
        "state-dir": str(state),
        "auth": "none",
        "operator-listen": "tcp:0:interface=127.0.0.1",
        "effort": effort,
        # Every delta counts here, also one that is larger than the full download.
        "max-delta-ratio": "10",
    }
    twistd = str(Path(sys.executable).with_name("twistd"))
    command = [
        twistd,
        "-n",
        "--pidfile=",
        "obdelta",
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("OBDELTA_")
    }
    log = state.with_suffix(".log")
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, cwd=CACHE.parent
            )
        watch = _Watch(process.pid)
        try:
            _wait_until_up(address, process, log)
            _wait_until_at_rest(process.pid)
            yield address, watch
        finally:
            watch.stop()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            _get(address, "/healthz")
        except (OSError, ValueError):
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(
        f"twistd obdelta did not come up:\n{log.read_text('utf-8', 'replace')[-2000:]}"
    )


def _wait_until_at_rest(pid: int) -> None:
    """Waits until the server is at rest: its workers start in parallel, and are not measured."""
    end, used, quiet = time.monotonic() + _START_SECONDS, -1.0, 0
    while quiet < _REST_SAMPLES and time.monotonic() < end:
        time.sleep(_REST_SECONDS)
        now = sum(_processor_seconds(each) for each in (pid, *_children(pid)))
        quiet = quiet + 1 if now - used < _AT_REST * _REST_SECONDS else 0
        used = now


def _processor_seconds(pid: int) -> float:
    """Returns the user and system time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _timed(address: str, base: str, target: str) -> tuple[float, str]:
    """Sends a builder's request and pulls the manifest; returns the seconds and the delta image's
    ``repository:tag``.
    """
    started = time.monotonic()
    raw = _get(address, f"/api/v3/delta?src={base}&dest={target}&wait=true")
    name = json.loads(raw)["name"]
    repository, _, tag = name.removeprefix(f"{address}/").rpartition(":")
    if not name.startswith(f"{address}/"):
        raise RuntimeError(f"no delta was served for {target}: the answer was {name}")
    _get(address, f"/v2/{repository}/manifests/{tag}")
    return time.monotonic() - started, f"{repository}:{tag}"


def _fetch_and_prove(address: str, name: str, pair: Pair, base: Path, scratch: Path) -> list[int]:
    """Pulls the delta image, proves each layer with rdiff, and returns the sizes of the real
    deltas.
    """
    repository, _, tag = name.rpartition(":")
    manifest = json.loads(_get(address, f"/v2/{repository}/manifests/{tag}"))
    config = json.loads(_get(address, f"/v2/{repository}/blobs/{manifest['config']['digest']}"))
    labels = config["config"]["Labels"]
    if Digest.of(labels["io.resin.delta.config"].encode()) != pair.target.image_id:
        raise RuntimeError("the delta image does not carry the target's config")
    if labels["io.resin.delta.base"] != str(pair.base.image_id):
        raise RuntimeError("the delta image does not name its base")
    targets = peer.differing(pair)
    blob, sizes = scratch / "served-layer", []
    for descriptor, target in zip(manifest["layers"][-len(targets) :], targets, strict=True):
        content = _get(address, f"/v2/{repository}/blobs/{descriptor['digest']}")
        if str(Digest.of(content)) != descriptor["digest"] or len(content) != descriptor["size"]:
            raise RuntimeError(f"the blob is not {descriptor['digest']}")
        blob.write_bytes(content)
        peer.prove(base, blob, target.diff_id, scratch)
        sizes.append(descriptor["size"])
    blob.unlink()
    return sizes


def _get(address: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=900)
    try:
        connection.request(
            "GET", urllib.parse.quote(path, safe="/?&=:@%"), headers={"Accept": DOCKER_MANIFEST}
        )
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(f"GET {path}: status {answer.status} {body[:200]!r}")
        return body
    finally:
        connection.close()
