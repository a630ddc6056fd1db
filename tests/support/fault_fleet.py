"""Many small images in a real registry, and devices that update from each to the next."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.images import file, make_image, make_layer, push
from obdelta.device import Device, Engine, Http, Update
from obdelta.device.pull import Pulled
from obdelta.errors import Broken, ServerFault
from obdelta.oci import Descriptor, Digest, Reference
from obdelta.oci.manifest import ACCEPT
from obdelta.store import files

PATIENCE = 60.0


class WrongBytes(AssertionError):
    """A device was given something that is not what its digest says, or a delta that does not lead
    to its target.
    """


@dataclass
class Tally:
    """What happened how often, from any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: int = 1) -> None:
        """Once more."""
        with self._lock:
            self.counts[name] += amount

    def show(self) -> None:
        """Prints it."""
        for name, count in sorted(self.counts.items()):
            print(f"{count:8,} {name}")


def repository(number: int) -> str:
    """Of the number-th image."""
    return f"v2/{number:032x}"


def make_fleet(
    directory: Path, registry: str, count: int, *, size: int = 40_000, seed: int = 1
) -> None:
    """Pushes ``count`` images; each shares its lowest layer with all, and most of the bytes of the
    others with the one before.

    ``size``: bytes of the larger of the layers that change.
    """
    source = random.Random(seed)
    shared = make_layer([file("etc/system", source.randbytes(5000))], directory / "blobs")
    program, notes = bytearray(source.randbytes(size)), bytearray(source.randbytes(9000))
    for number in range(count):
        for content in (program, notes):
            at = source.randrange(len(content) - 600)
            content[at : at + 600] = source.randbytes(600)
        layers = [shared]
        layers += [make_layer([file("bin/program", bytes(program))], directory / "blobs", level=1)]
        layers += [make_layer([file("app/notes", bytes(notes))], directory / "blobs", level=1)]
        push(make_image(layers, directory / "image"), registry, repository(number))


class _Engine(Engine):
    """Pulls deltas from the server, and all else from the registry itself: what is wrong then is
    the server's doing.
    """

    direct: Engine

    def pull(self, reference: Reference) -> Pulled:
        """By the tag."""
        return super().pull(reference) if _is_delta(reference) else self.direct.pull(reference)

    def download(
        self,
        image: Pulled,
        layer: Descriptor,
        out: Path,
        received: Callable[[int], None] = lambda _: None,
    ) -> None:
        """From where the image came."""
        if _is_delta(image.reference):
            super().download(image, layer, out, received)
        else:
            self.direct.download(image, layer, out, received)


def _is_delta(reference: Reference) -> bool:
    return (reference.tag or "").startswith("delta-")


@dataclass(frozen=True)
class Fleet:
    """Devices of one registry. ``host`` is how the server is called in image names."""

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
        """A device that runs image ``number`` updates to the next (or ``step`` further), by way of
        the server at this URL.

        Its base and the target's manifest it has from the registry itself: whatever is wrong is the
        server's doing. Raises WrongBytes, and ServerFault or OSError for what a device tries again
        after.
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

    def manifest_digest(self, number: int) -> Digest:
        """Of the number-th image, as the registry tells it."""
        url = f"{self.registry}/v2/{repository(number)}/manifests/latest"
        with Http(timeout=30).ask("HEAD", url, {"Accept": ", ".join(ACCEPT)}) as answer:
            return Digest.parse(answer.headers["docker-content-digest"])

    def update_again(self, server: str, number: int, tries: int, tally: Tally) -> Update:
        """As a device does it: what can pass is tried again."""
        for left in reversed(range(tries)):
            try:
                return self.update(server, number)
            except (ServerFault, OSError):
                tally.add("attempts of devices that failed and were retried")
                if not left:
                    raise
        raise AssertionError("there is at least one try")


def check_store(state: Path, known: set[tuple[str, int]] | None = None) -> int:
    """Everything that is kept under a digest has it; gives back how many files were read. No server
    may be running.

    ``known``: files (name, inode) that were compared before, and need not be again; what is read
    now is added.
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
    """What a server builds now. ``operators``: a URL."""
    with urllib.request.urlopen(f"{operators}/api/v1/builds", timeout=PATIENCE) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())["builds"]
    return found


def until_tidy(state: Path, operators: str) -> None:
    """Waits until a server builds nothing and no temporary is left: there must be none for good."""
    deadline = time.monotonic() + PATIENCE
    while (running := builds(operators)) or any((state / "tmp").iterdir()):
        assert time.monotonic() < deadline, f"{running}, {list((state / 'tmp').iterdir())}"
        time.sleep(0.02)  # polled: it is another process's business


def give_up(operators: str) -> None:
    """Everything that may go, goes."""
    headers = {"content-type": "application/json"}
    body = json.dumps({"free": 1 << 40}).encode()
    request = urllib.request.Request(f"{operators}/api/v1/gc", body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        answer.read()
