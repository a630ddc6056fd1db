"""A real ``dockerd`` with a data root, socket and containerd of its own; nothing of it stays.

    with running_dockerd() as engine:
        engine.load(image)                                  # a bench.images.Image
        engine.client.images.pull("127.0.0.1:5000/v2/…")    # the docker SDK; loopback registries
        may be plain HTTP with engine.mounted("sha256:…") as root: ...        # the image's root
        filesystem, through a real overlay mount

Must be root. As a fixture, one for all tests (``tests/conftest.py``): images that a test loads are
seen by the others then, so give them names and contents of their own.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker
import pytest

from bench.images import Image

STOP_SECONDS = 30.0
_LISTENING = re.compile(rb"API listen on (/[^\"\s]+)")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True)
class RunningDockerd:
    """``socket`` is where it listens; ``client`` is a docker SDK client of it (pull time-out 5
    minutes).
    """

    process: subprocess.Popen[bytes]
    directory: Path
    socket: Path
    client: docker.DockerClient

    @property
    def url(self) -> str:
        """The value for ``DOCKER_HOST``."""
        return f"unix://{self.socket}"

    @property
    def data_root(self) -> Path:
        """The directory of its images."""
        return self.directory / "data"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs ``docker ARGUMENTS`` on this engine and returns its result, also after a failure;
        ``variables`` are added to its environment.
        """
        environment = {
            **_environment(),
            "DOCKER_HOST": self.url,
            "HOME": str(self.directory),
            **variables,
        }
        return subprocess.run(
            ["docker", *arguments], env=environment, capture_output=True, text=True, check=False
        )

    def command(self, *arguments: str) -> str:
        """Runs ``docker`` and returns its standard output. Fails the test with its messages."""
        ran = self.run(*arguments)
        if ran.returncode:
            raise AssertionError(
                f"docker {' '.join(arguments)}: status {ran.returncode}: {ran.stderr[-2000:]}"
            )
        return ran.stdout

    def load(self, image: Image, name: str | None = None) -> str:
        """Loads an image as ``docker load`` does, under ``name`` (``repository:tag``) if given;
        returns its ID.
        """
        with tempfile.TemporaryFile(dir=self.directory) as archive:
            write_archive(image, archive, name)
            archive.seek(0)
            loaded = self.client.images.load(archive)
        (image_id,) = {one.id for one in loaded}
        assert image_id == str(image.image_id)
        return str(image_id)

    def inspect(self, image: str) -> dict[str, Any]:
        """Returns the output of ``docker inspect`` for an image."""
        (shown,) = json.loads(self.command("inspect", "--type", "image", image))
        return dict(shown)

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Yields the root filesystem of an image, as containers start from it: a read-only overlay
        mount of its layers.
        """
        driver = self.inspect(image)["GraphDriver"]
        assert driver["Name"] == "overlay2", f"the storage driver is {driver['Name']}"
        places = [
            driver["Data"]["UpperDir"],
            *filter(None, driver["Data"].get("LowerDir", "").split(":")),
        ]
        root = Path(tempfile.mkdtemp(prefix="mounted-", dir=self.directory))
        if (
            len(places) == 1
        ):  # overlay needs two at least; a single layer has no whiteouts to interpret
            places.append(tempfile.mkdtemp(prefix="nothing-", dir=self.directory))
        # The kernel accepts one page of options, so the driver's short names are used, relative
        # to its directory.
        short = {
            str(link.resolve()): f"l/{link.name}"
            for link in (self.data_root / "overlay2" / "l").iterdir()
        }
        options = "lowerdir=" + ":".join(short.get(place, place) for place in places)
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", f"ro,{options}", root],
            cwd=self.data_root / "overlay2",
            check=True,
        )
        try:
            yield root
        finally:
            subprocess.run(["umount", root], check=True)


@contextmanager
def running_dockerd(
    *,
    insecure_registries: Sequence[str] = (),
    mirrors: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Iterator[RunningDockerd]:
    """Starts an engine, and removes it with all its content at the end.

    Registries on 127.0.0.0/8 are used without TLS. ``settings`` are more keys of ``daemon.json``
    (``{"storage-driver": "vfs"}``, ``{"max-concurrent-downloads": 1}``).
    """
    # A short path: those of the sockets in it may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="dockerd-"))
    socket = directory / "docker.sock"
    config = {
        "data-root": str(directory / "data"),
        "exec-root": str(directory / "exec"),
        "pidfile": str(directory / "dockerd.pid"),
        "hosts": [f"unix://{socket}"],
        "iptables": False,
        "ip6tables": False,
        "ip-forward": False,
        "ip-masq": False,
        "bridge": "none",
        "insecure-registries": list(insecure_registries),
        "registry-mirrors": list(mirrors),
        **(settings or {}),
    }
    (directory / "daemon.json").write_text(json.dumps(config))
    # It ends with this process, however that ends, and its containerd with it.
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "dockerd",
        "--config-file",
        str(directory / "daemon.json"),
    ]
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**_environment(), "HOME": str(directory)},
        ) as process:
            assert process.stderr is not None
            try:
                _wait_until_listening(process.stderr)
                # Its output is read on: a full pipe would stop it.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                client = docker.DockerClient(f"unix://{socket}", timeout=300)
                try:
                    yield RunningDockerd(process, directory, socket, client)
                finally:
                    client.close()
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        _unmount_below(directory)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def dockerd() -> Iterator[RunningDockerd]:
    """One engine for all tests of the session that import this."""
    with running_dockerd() as engine:
        yield engine


def write_archive(image: Image, out: IO[bytes], name: str | None = None) -> None:
    """Writes an archive for ``docker load``: config, compressed layers, and a ``manifest.json``
    that names them.
    """
    config = f"{image.image_id.hex}.json"
    layers = [f"{number}-{layer.diff_id.hex}.tar" for number, layer in enumerate(image.layers)]
    manifest = [{"Config": config, "RepoTags": [name] if name else None, "Layers": layers}]
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in (
            (config, image.config),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member, layer in zip(layers, image.layers, strict=True):
            archive.add(layer.path, member)


def _wait_until_listening(log: IO[bytes]) -> None:
    output = b""
    for line in log:
        output += line
        if _LISTENING.search(line):
            return
    raise AssertionError(f"dockerd did not start: {output[-3000:].decode('utf-8', 'replace')}")


def _environment() -> dict[str, str]:
    """Returns our environment without proxies and without the address of another engine."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in _PROXIES and not name.startswith("DOCKER_")
    }


def _unmount_below(directory: Path) -> None:
    """Unmounts the file systems that a killed engine left."""
    mounts = [
        line.split()[4] for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    ]
    for mount in reversed(mounts):
        if Path(mount).is_relative_to(directory):
            subprocess.run(["umount", "--lazy", mount], check=True)
