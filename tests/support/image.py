"""Our container image, built from the Dockerfile by a real Docker engine; and a network on which
its containers are reached.

Tests cannot pull images, so the base is not Python's own image but a similar one made from
Debian's packages: bookworm, minimal, with python3 and the machine's own certificate authorities (a
proxy may intercept TLS here). It is kept in ``.cache``. Must be root. As a fixture, built once for
all tests: ``built_image`` (``tests/conftest.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.dockerd import RunningDockerd

ROOT = Path(__file__).parent.parent.parent
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
NAME = "obdelta:test"
START_SECONDS = 60.0
_BASE_RECIPE = (
    "--mode=root",
    "--variant=apt",
    "--include=python3,ca-certificates",
    # usr-is-merged instead of usrmerge, which would bring perl.
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    (
        '--setup-hook=printf "Package: usrmerge\\nPin: version *\\nPin-Priority: -1\\n"'
        ' >"$1/etc/apt/preferences.d/usrmerge"'
    ),
    # As Debian's own slim images: no documentation, and no fsync after every file of a package.
    "--dpkgopt=force-unsafe-io",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    f"--customize-hook=copy-in {AUTHORITIES} /etc/ssl/certs",
    "bookworm",
)


@dataclass(frozen=True)
class BuiltImage:
    """``log`` is the build's output; sizes count uncompressed files, as ``docker images`` does."""

    engine: RunningDockerd
    name: str
    log: str
    size: int
    base_size: int


@dataclass(frozen=True)
class Container:
    """A started container, removed with its volumes at the end of the block."""

    engine: RunningDockerd
    id: str

    @property
    def state(self) -> Mapping[str, object]:
        """Returns the State of ``docker inspect``."""
        (shown,) = json.loads(self.engine.command("inspect", self.id))
        return dict(shown["State"])

    @property
    def address(self) -> str:
        """Returns its address on its only network."""
        (shown,) = json.loads(self.engine.command("inspect", self.id))
        (joined,) = shown["NetworkSettings"]["Networks"].values()
        return str(joined["IPAddress"])

    @property
    def log(self) -> str:
        """Returns its standard output and error."""
        ran = self.engine.run("logs", self.id)
        return ran.stdout + ran.stderr

    def execute(self, *command: str) -> str:
        """Runs a command in it, as its user; returns the standard output."""
        return self.engine.command("exec", self.id, *command)

    def wait_for_log(self, pattern: str) -> None:
        """Waits until its log matches the expression; fails if it ends first, or after a minute."""
        deadline = time.monotonic() + START_SECONDS
        while not re.search(pattern, self.log):
            if not self.state["Running"] or time.monotonic() > deadline:
                raise AssertionError(f"the container never said {pattern!r}:\n{self.log[-4000:]}")
            time.sleep(0.1)

    def wait_until_healthy(self) -> None:
        """Waits for the image's own health check."""
        deadline = time.monotonic() + START_SECONDS
        while (health := dict(self.state["Health"]))["Status"] != "healthy":  # type: ignore[call-overload]
            if not self.state["Running"] or time.monotonic() > deadline:
                raise AssertionError(f"never healthy: {health}\n{self.log[-4000:]}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Runs ``docker stop`` (SIGTERM, and SIGKILL after 30 s); returns the exit status."""
        self.engine.command("stop", "--time", "30", self.id)
        return int(str(self.state["ExitCode"]))


@dataclass(frozen=True)
class Network:
    """A bridge between this machine (whose address on it is ``gateway``) and containers, without
    any other connection.
    """

    name: str
    gateway: str


@contextmanager
def container(image: BuiltImage, options: Sequence[str], *arguments: str) -> Iterator[Container]:
    """Runs ``docker run --detach OPTIONS IMAGE ARGUMENTS``."""
    started = Container(
        image.engine,
        image.engine.command("run", "--detach", *options, image.name, *arguments).strip(),
    )
    try:
        yield started
    finally:
        image.engine.command("rm", "--force", "--volumes", started.id)


@contextmanager
def network(engine: RunningDockerd) -> Iterator[Network]:
    """Makes a network; no container may be left on it at the end."""
    name = f"obdelta-{os.getpid()}"
    engine.command("network", "create", "--internal", name)
    try:
        (shown,) = json.loads(engine.command("network", "inspect", name))
        (pool,) = shown["IPAM"]["Config"]
        yield Network(name, str(pool["Gateway"]))
    finally:
        engine.command("network", "rm", name)


@pytest.fixture(scope="session")
def built_image(dockerd: RunningDockerd) -> BuiltImage:
    """One build for all tests of the session."""
    dockerd.command("import", str(_base()), "obdelta-base:test")
    arguments = {"BASE": "obdelta-base:test", "PIP_CERT": AUTHORITIES}
    if index := os.environ.get("PIP_INDEX_URL"):
        arguments["PIP_INDEX_URL"] = index
    ran = dockerd.run(
        "build",
        "--network=host",  # the test's engine has no bridge to other networks
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        f"--tag={NAME}",
        str(ROOT),
        DOCKER_BUILDKIT="0",  # Debian's engine has no buildx
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    sizes = [int(dockerd.inspect(name)["Size"]) for name in (NAME, "obdelta-base:test")]
    return BuiltImage(dockerd, NAME, ran.stdout, *sizes)


def _base() -> Path:
    """Returns the base's root filesystem as a tar; made once, and again if the recipe or the
    authorities change.
    """
    recipe = hashlib.sha256(
        "\0".join(_BASE_RECIPE).encode() + Path(AUTHORITIES).read_bytes()
    ).hexdigest()[:16]
    made = ROOT / ".cache" / f"image-base-{recipe}.tar"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        growing = made.with_name(f"{made.stem}-{os.getpid()}.tar")
        try:
            subprocess.run(
                ["mmdebstrap", "--quiet", *_BASE_RECIPE, str(growing)],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            growing.rename(made)
        finally:
            growing.unlink(missing_ok=True)
    return made
