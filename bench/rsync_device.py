"""A device of v2: it sends the requests of a supervisor, downloads the batch, applies it with the
machine's own rsync, and compares.

The device's root filesystem is a tree in which any user can keep any owner, mode and device
(rsync's ``--fake-super``), so root is not needed. The result must be the target's root filesystem,
entry by entry.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.images import Image
from obdelta.delta.inflate import import_layer
from obdelta.device.http import Http, ServerFault
from obdelta.oci.config import parse_config
from obdelta.rootfs.unpack import unpack
from obdelta.rsync import proof
from obdelta.rsync.docker_config import docker_config

SUPERVISOR = "Supervisor/14.9.4 (Linux; a demonstration)"
"""One of the last supervisors whose docker-delta can apply v2."""
_MAX_LAYER = 16 << 30
_RETRIED = (502, 504)
_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class Applied:
    """A finished update whose result was compared with the target. Bytes are those of the
    download.
    """

    pulled_bytes: int
    request_seconds: float
    pulling_seconds: float
    patching_seconds: float


def root_filesystem(image: Image, out: Path) -> Path:
    """Unpacks the image's tree below ``out``."""
    with TemporaryDirectory(dir=out.parent, prefix="tars-") as scratch:
        tars = []
        for number, layer in enumerate(image.layers):
            tar = Path(scratch) / f"{number}.tar"
            import_layer(layer.path, tar, limit=_MAX_LAYER)
            tars.append((layer.diff_id, tar))
        unpack(tars, out)
    return out / "root"


def update(
    server: str, old: str, new: str, base: Path, target: Path, image: Image, work: Path
) -> Applied:
    """Updates the tree ``base`` to the server's ``image``. Raises ServerFault, ProofFailed."""
    started = time.monotonic()
    location = ask(server, old, new)
    requested = time.monotonic()
    stream = work / "stream"
    with Http(user_agent=SUPERVISOR).request("GET", location) as answer, stream.open("wb") as out:
        if (
            answer.status != 200
            or not answer.length
            or answer.headers.get("accept-ranges") != "bytes"
        ):
            raise answer.fault()
        for chunk in answer.chunks():
            out.write(chunk)
    pulled = time.monotonic()
    device = work / "root"
    proof.copy_for_proof(base, target, device)
    copied = time.monotonic()
    apply(stream, image, device)
    applied = time.monotonic()
    proof.check_result(device, target)
    return Applied(stream.stat().st_size, requested - started, pulled - requested, applied - copied)


def ask(server: str, old: str, new: str) -> str:
    """Returns the URL of the batch, after as many retries as necessary. Raises ServerFault."""
    while True:
        with Http(user_agent=SUPERVISOR).request(
            "GET", f"{server}/api/v2/delta?src={old}&dest={new}"
        ) as answer:
            if 300 <= answer.status < 400 and "location" in answer.headers:
                return answer.headers["location"]
            if answer.status not in _RETRIED:
                raise answer.fault()
        time.sleep(_PAUSE)


def apply(stream: Path, image: Image, device: Path) -> None:
    """Patches the tree ``device`` in place. Raises ServerFault; :func:`proof.check_result` checks
    the result.
    """
    with stream.open("rb") as opened:
        head = bytearray()
        while (byte := opened.read(1)) not in (b"", b"\0"):
            head += byte
        if json.loads(head) != {
            "version": 2,
            "dockerConfig": docker_config(parse_config(image.config)),
        }:
            raise ServerFault("the v2 stream", "does not begin with the target's config")
        # A separate descriptor for rsync: the position of Python's buffer is not that of the
        # file.
        at = opened.tell()
        with stream.open("rb", buffering=0) as batch:
            batch.seek(at)
            command = [
                "rsync",
                "--archive",
                "--delete",
                "--fake-super",
                "--read-batch=-",
                f"{device}/",
            ]
            ran = subprocess.run(command, stdin=batch, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ServerFault(
            "the v2 stream",
            f"was not applied: rsync ended with {ran.returncode}: {ran.stderr[-500:]}",
        )
