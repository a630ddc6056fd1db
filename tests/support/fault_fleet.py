"""Many small images in a real registry, and devices that update from each to the next."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import rsync_device
from bench.images import Image, file, make_image, make_layer, push
from obdelta.device.http import Http, ServerFault
from obdelta.device.pull import Engine, PulledImage
from obdelta.device.update import Device, Update
from obdelta.errors import Broken
from obdelta.oci import Descriptor, Digest, Reference
from obdelta.oci.manifest import ACCEPT
from obdelta.store import files

PATIENCE = 60.0


class WrongBytes(AssertionError):
    """A device received bytes that differ from their digest, or a delta that does not produce its
    target.
    """


@dataclass
class Tally:
    """Counts events, from any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: int = 1) -> None:
        """Counts an event once more."""
        with self._lock:
            self.counts[name] += amount

    def show(self) -> None:
        """Prints the counts."""
        for name, count in sorted(self.counts.items()):
            print(f"{count:8,} {name}")


def repository(number: int) -> str:
    """Returns the repository of the number-th image."""
    return f"v2/{number:032x}"


def make_fleet(
    directory: Path,
    registry: str,
    count: int,
    *,
    size: int = 40_000,
    seed: int = 1,
    names: Callable[[int], str] = repository,
) -> list[Image]:
    """Pushes ``count`` images, and returns them. All share the lowest layer, and each shares most
    bytes of the other layers with the image before it. ``size``: bytes of the larger of the layers
    that change. ``names``: repositories by number.
    """
    source = random.Random(seed)
    shared = make_layer([file("etc/system", source.randbytes(5000))], directory / "blobs")
    program, notes = bytearray(source.randbytes(size)), bytearray(source.randbytes(9000))
    images = []
    for number in range(count):
        for content in (program, notes):
            at = source.randrange(len(content) - 600)
            content[at : at + 600] = source.randbytes(600)
        layers = [shared]
        layers += [make_layer([file("bin/program", bytes(program))], directory / "blobs", level=1)]
        layers += [make_layer([file("app/notes", bytes(notes))], directory / "blobs", level=1)]
        images.append(make_image(layers, directory / "image"))
        push(images[-1], registry, names(number))
    return images


class _Engine(Engine):
    """Pulls deltas from the server, and everything else from the registry itself, so that any
    fault is the server's.
    """

    direct: Engine

    def pull(self, reference: Reference) -> PulledImage:
        """Pulls by tag."""
        return super().pull(reference) if _is_delta(reference) else self.direct.pull(reference)

    def download(
        self,
        image: PulledImage,
        layer: Descriptor,
        out: Path,
        received: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Downloads from the host of the image."""
        if _is_delta(image.reference):
            super().download(image, layer, out, received)
        else:
            self.direct.download(image, layer, out, received)


def _is_delta(reference: Reference) -> bool:
    return (reference.tag or "").startswith("delta-")


@dataclass(frozen=True)
class Fleet:
    """Devices of one registry. ``host`` is the server's host in image names."""

    registry: str

    def update(
        self,
        server: str,
        number: int,
        *,
        step: int = 1,
        deadline: float = 60.0,
        timeout: float = 30.0,
    ) -> Update:
        """Updates a device from image ``number`` to the next (or ``step`` further), through the
        server at this URL.

        The base and the target's manifest come from the registry itself, so any fault is the
        server's. Raises WrongBytes; ServerFault or OSError where a device retries.
        """
        host = server.partition("//")[2]
        direct = Engine(Http(timeout=timeout), registry=self.registry)
        with TemporaryDirectory() as folder:
            work = Path(folder)
            base = Device(Http(timeout=timeout), direct, server).load_base(
                Reference("", repository(number)), work
            )
            engine = _Engine(Http(timeout=timeout), registry=server)
            engine.direct = direct
            device = Device(Http(timeout=timeout), engine, server)
            source, target = (f"{host}/{repository(image)}" for image in (number, number + step))
            try:
                return device.update(base, source, target, work, deadline)
            except Broken as error:
                raise WrongBytes(str(error)) from error

    def update_tree(self, server: str, number: int, images: list[Image]) -> None:
        """Updates a v2 device as :meth:`update` does, and compares its tree with the target's.

        Raises ServerFault or OSError where a device retries, ProofFailed for wrong bytes.
        """
        host = server.partition("//")[2]
        with TemporaryDirectory() as folder:
            work = Path(folder)
            base, target = (
                rsync_device.root_filesystem(image, work / f"tree-{place}")
                for place, image in enumerate(images[number : number + 2])
            )
            old, new = (f"{host}/{repository(image)}" for image in (number, number + 1))
            rsync_device.update(server, old, new, base, target, images[number + 1], work)

    def manifest_digest(self, number: int) -> Digest:
        """Returns the digest of the number-th image's manifest in the registry."""
        url = f"{self.registry}/v2/{repository(number)}/manifests/latest"
        with Http(timeout=30).request("HEAD", url, {"Accept": ", ".join(ACCEPT)}) as answer:
            return Digest.parse(answer.headers["docker-content-digest"])

    def update_again(self, server: str, number: int, tries: int, tally: Tally) -> Update:
        """Updates like a device: transient errors are retried."""
        for left in reversed(range(tries)):
            try:
                return self.update(server, number)
            except (ServerFault, OSError):
                tally.add("attempts of devices that failed and were retried")
                if not left:
                    raise
        raise AssertionError("there is at least one try")


def check_store(state: Path, known: set[tuple[str, int]] | None = None) -> int:
    """Compares every file named by a digest with it; returns how many were read.

    No server may be running. ``known``: files (name, inode) that were compared before and are
    skipped; files read now are added.
    """
    checked = 0
    known = set() if known is None else known
    for folder, suffix in (("blobs", ""), ("layers", ".tar"), ("upstream", ".blob")):
        for path in sorted((state / folder).rglob(f"*{suffix}")):
            if (
                path.is_file()
                and path.suffix == suffix
                and (entry := (path.name, path.stat().st_ino)) not in known
            ):
                known.add(entry)
                checked += 1
                if files.digest_of(path) != Digest(path.stem):
                    raise WrongBytes(f"{path} is not what it is called")
    return checked


def builds(operators: str) -> list[dict[str, Any]]:
    """Returns the builds of a server. ``operators``: a URL."""
    with urllib.request.urlopen(f"{operators}/api/v1/builds", timeout=PATIENCE) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())["builds"]
    return found


def until_tidy(state: Path, operators: str) -> None:
    """Waits until a server builds nothing and has no temporary files."""
    deadline = time.monotonic() + PATIENCE
    while (running := builds(operators)) or any((state / "tmp").iterdir()):
        assert time.monotonic() < deadline, f"{running}, {list((state / 'tmp').iterdir())}"
        time.sleep(0.02)  # polled, because another process does it


def _ready(operators: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{operators}/readyz", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def until_ready(operators: str, status: int) -> str:
    """Polls readiness: a result is cached for a few seconds."""
    deadline = time.monotonic() + PATIENCE
    while (found := _ready(operators))[0] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found[1]


def evict_layers(state: Path, operators: str) -> None:
    """Evicts everything that may be evicted."""
    key = (state / "operator-key").read_bytes().hex()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    body = json.dumps({"free": 1 << 40}).encode()
    request = urllib.request.Request(f"{operators}/api/v1/gc", body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        answer.read()
