"""A container as open-balena-helm starts open-balena-delta, without an engine: it has its own file
system, network and environment.

Run as ``unshare --mount --net --propagation private python -m tests.support.peer_place FOLDER``
(as root). In a copy-on-write view of this machine it puts the API's certificate and the volumes
where the chart puts them. It runs a registry with TLS on port 443 that the system trusts, then
``twistd obdelta`` with the chart's variables alone, and acts as the device on port 80. It writes
one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.images import push
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.registry import BUILDER_TOKEN, running_registry
from tests.support.server import command
from tests.support.tokens import Issuer, make_certificate, make_key, private_pem, pulls

TLD = "openbalena.test"
REGISTRY = f"registry.{TLD}"
ENVIRONMENT = {
    "BALENA_TLD": TLD,
    "REGISTRY_HOST": REGISTRY,
    "DOCKER_HOST": "unix:///var/run/balena-engine.sock",
    "DOCKER_BUILDKIT": "1",
    "TOKEN_AUTH_BUILDER_TOKEN": BUILDER_TOKEN,
    "JWT_ALGO": "ES256",
}
PEER_NAME = (
    f"{TARGET_REPOSITORY.removeprefix('v2/')}:delta-{BASE_REPOSITORY.removeprefix('v2/')[:16]}"
)
_OURS = "http://127.0.0.1"


def enter(folder: Path) -> None:
    """Enters a root file system over the machine's, and enables loopback."""
    merged, upper = folder / "merged", folder / "upper"
    merged.mkdir()
    upper.mkdir()
    _run("mount", "-t", "tmpfs", "tmpfs", upper)
    for name in ("changed", "work"):
        (upper / name).mkdir()
    layers = f"lowerdir=/,upperdir={upper}/changed,workdir={upper}/work"
    _run("mount", "-t", "overlay", "overlay", "-o", layers, merged)
    here = Path(__file__).parent.parent.parent
    # The view has only the root file system.
    for place in {
        Path("/proc"),
        Path("/dev"),
        here,
        Path(sys.prefix),
        Path(sys.base_prefix),
        folder / "disk",
    }:
        (merged / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
        _run("mount", "--rbind", place, merged / place.relative_to("/"))
    os.chroot(merged)
    os.chdir(here)
    with socket.socket() as any_socket:
        up = struct.pack("16sh", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS


def create_files(disk: Path) -> tuple[Issuer, tuple[Path, Path]]:
    """Creates the certificate and the volumes; the system trusts the registry's authority."""
    issuer = Issuer(issuer=f"api.{TLD}", audience=REGISTRY)
    certs = Path("/certs/private")
    certs.mkdir(parents=True)
    issuer.write(certs)
    for volume in ("/var/lib/balena-engine", "/delta-rsync"):
        Path(volume).mkdir(parents=True, exist_ok=True)
        place = disk / Path(volume).name
        place.mkdir()
        _run("mount", "--bind", place, volume)
    Path("/delta-rsync", PEER_NAME).write_bytes(b"what open-balena-delta left")
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write(f"\n127.0.0.1 localhost {REGISTRY}\n")
    key = make_key("ES256")
    pair = disk / "registry.pem", disk / "registry.key"
    pair[0].write_bytes(make_certificate(key, REGISTRY))
    pair[1].write_bytes(private_pem(key))
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    bundle.write_bytes(bundle.read_bytes() + b"\n" + pair[0].read_bytes())
    return issuer, pair


def as_a_device(issuer: Issuer, work: Path, updated: Any) -> dict[str, Any]:
    """Makes one v3 update, one v2 download, and a download by open-balena-delta's own URL."""
    token, http = issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY)), Http(timeout=60)
    bearer = {"Authorization": f"Bearer {token}"}
    device = Device(http, Engine(http, token=token, registry=_OURS), _OURS, token=token)
    source, target = f"{REGISTRY}/{BASE_REPOSITORY}", f"{REGISTRY}/{TARGET_REPOSITORY}"
    update = device.update(device.load_base(Reference.parse(source), work), source, target, work)
    with http.request(
        "GET", f"{_OURS}/api/v2/delta?src={source}&dest={target}&wait=true", bearer
    ) as answer:
        status, location = answer.status, answer.headers["location"]
    with http.request("GET", location.replace(f"https://delta.{TLD}", _OURS)) as answer:
        v2 = b"".join(answer.chunks())
    peers = f"{_OURS}/api/v2/delta/download?delta={PEER_NAME}"
    with http.request("GET", peers) as answer:
        without = answer.status
    with http.request("GET", peers, bearer) as answer:
        left = answer.small(1000).decode()
    return {
        "name": update.name,
        "is_delta": update.is_delta,
        "updated": update.image_id == updated,
        "v2_status": status,
        "v2_location": location,
        "v2_version": json.loads(v2[: v2.index(0)])["version"],
        "peer_without_token": without,
        "peer_with_token": left,
        "state": sorted(path.name for path in Path("/var/lib/balena-engine/obdelta").iterdir()),
    }


def main() -> int:
    """Runs all steps; the exit status is the server's."""
    folder = Path(sys.argv[1])
    disk = folder / "disk"  # a tmpfs may lack user attributes, which v2 needs
    disk.mkdir()
    enter(folder)
    issuer, certificate = create_files(disk)
    pair = make_pair(disk / "pair")
    with running_registry(disk / "registry", certificate=certificate, port=443) as registry:
        for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY)):
            push(image, f"https://{REGISTRY}", repository, "latest")
        assert registry.url == "https://localhost:443"
        with (disk / "log").open("wb") as log:
            environment = {"PATH": os.environ["PATH"], **ENVIRONMENT}
            # Not in the checkout, whose tap.conf would be found.
            server = subprocess.Popen(command(), env=environment, cwd=disk, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", 80)).close()
                    break
                except ConnectionRefusedError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise AssertionError((disk / "log").read_text()[-3000:]) from None
                    time.sleep(0.05)
            work = disk / "work"
            work.mkdir()
            json.dump(as_a_device(issuer, work, pair.target.image_id), sys.stdout)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    return status


def _run(*arguments: object) -> None:
    subprocess.run([str(argument) for argument in arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
