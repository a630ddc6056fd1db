"""The container image: built from the Dockerfile by a real Docker engine, and run as
docs/docker.md says.

``tests/support/image.py`` names the replacement for Python's own base image.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image import BuiltImage, Container, Network, container, network

ROOT = Path(__file__).parents[2]
SIZE_LIMIT = 200_000_000
"""Bytes of the whole image, base included."""
OWN = 60_000_000
"""Bytes that it adds to its base, those that workers need included (RQ and its Redis client)."""
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


pytestmark = pytest.mark.timeout(900)  # whichever test comes first waits for the build


@pytest.fixture(scope="module")
def bridge(built_image: BuiltImage) -> Iterator[Network]:
    with network(built_image.engine) as made:
        yield made


@pytest.fixture(scope="module")
def hardened(built_image: BuiltImage, bridge: Network) -> Iterator[Container]:
    """Runs it as docs/docker.md says, with all privileges removed that can be."""
    options = [
        f"--network={bridge.name}",
        *HARDENED,
        "--health-interval=1s",
        "--volume=obdelta-state:/var/lib/obdelta",
    ]
    settings = ["--auth=none", "--upstream=http://registry.test", "--public-url=http://delta.test"]
    with container(built_image, options, *settings) as running:
        running.wait_until_healthy()
        yield running


def test_the_image_is_small(built_image: BuiltImage) -> None:
    assert built_image.size <= SIZE_LIMIT
    assert built_image.size - built_image.base_size <= OWN


def test_the_wheel_is_built_once(built_image: BuiltImage) -> None:
    assert len(re.findall(r"Building wheel for obdelta .*: started", built_image.log)) == 1
    assert not re.findall(r"Building wheel for (?!obdelta)", built_image.log), (
        "a dependency came without a wheel"
    )


def test_the_image_has_no_build_tools(built_image: BuiltImage) -> None:
    code = (
        "import json, os, shutil\nprograms = [n for n in ('gcc', 'cc', 'c99', 'as', 'ld', 'pip',"
        " 'pip3', 'make') if shutil.which(n)]\nleft = [p for p in ('/source', '/wheel', '/tools',"
        " '/usr/include/stdio.h') if os.path.exists(p)]\npips = [r for r, d, _ in"
        " os.walk('/opt/obdelta') if os.path.basename(r) in ('pip', 'tests', 'test')]\nlists ="
        " os.listdir('/var/lib/apt/lists')\nprint(json.dumps([programs, left, pips, lists]))"
    )
    ran = built_image.engine.command(
        "run", "--rm", "--network=none", "--entrypoint=python3", built_image.name, "-c", code
    )
    assert json.loads(ran) == [[], [], [], []]


def test_nothing_in_the_dockerfile_is_bound_to_an_architecture() -> None:
    text = (ROOT / "Dockerfile").read_text() + (ROOT / "deploy/image/low-ports.c").read_text()
    assert not re.findall(r"(?i)amd64|x86.64|arm64|aarch64|-m(?:arch|tune|cpu)|platform=", text)


def test_the_image_runs_unprivileged_and_read_only(hardened: Container) -> None:
    """The root file system is read-only, there are no capabilities and no new privileges, and its
    own check is healthy.
    """
    assert hardened.execute("id", "-u").strip() == "10001"
    status = hardened.execute("cat", "/proc/1/status")
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    ran = hardened.engine.run("exec", hardened.id, "touch", "/opt/obdelta/x")
    assert "Read-only file system" in ran.stderr
    with urllib.request.urlopen(f"http://{hardened.address}:8080/healthz", timeout=60) as answer:
        assert answer.read() == b"ok\n"


def test_twistd_is_process_1_and_ends_with_0(hardened: Container) -> None:
    command = hardened.execute("cat", "/proc/1/cmdline").split("\0")
    assert command[0].startswith("/opt/obdelta/bin/python")
    assert command[1].endswith("/twistd")
    assert hardened.stop() == 0
    assert "Server Shut Down" in hardened.log


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ([], True),
        (["--privileged"], True),
        (["--security-opt=no-new-privileges"], False),
        (["--cap-drop=ALL"], False),
        (["--cap-drop=ALL", "--cap-add=NET_BIND_SERVICE"], True),
    ],
)
def test_port_80_where_it_is_reserved_for_root(
    built_image: BuiltImage, bridge: Network, options: list[str], may: bool
) -> None:
    """containerd before 2.0 and CRI-O reserve it for root (Docker by default does not): the
    image's own capability is enough.
    """
    reserved = [
        f"--network={bridge.name}",
        "--sysctl=net.ipv4.ip_unprivileged_port_start=1024",
        *options,
    ]
    settings = [
        "--listen=tcp:80",
        "--auth=none",
        "--upstream=http://registry.test",
        "--public-url=http://delta.test",
    ]
    with container(built_image, reserved, *settings) as running:
        if may:
            running.wait_for_log(r"devices: listening on http://\S+:80\b")
            assert running.execute("id", "-u").strip() == "10001"
            # There are no other files.
            assert re.search(
                r"^CapEff:\t0+400$", running.execute("cat", "/proc/1/status"), re.MULTILINE
            )
        else:
            assert built_image.engine.command("wait", running.id).strip() == "2"
            assert "setting listen has the value 'tcp:80'" in running.log
            assert "Permission denied" in running.log


def test_bad_settings_are_reported_in_one_line(built_image: BuiltImage) -> None:
    ran = built_image.engine.run(
        "run", "--rm", "--network=none", "--env=BALENA_TLD=example.com", built_image.name
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("obdelta: ")
    assert "/certs/private/api.example.com.pem" in ran.stderr


def test_the_launcher_runs_other_programs(built_image: BuiltImage) -> None:
    for arguments, status in (((), 2), (("/nothing",), 127), (("true",), 0)):
        ran: subprocess.CompletedProcess[str] = built_image.engine.run(
            "run", "--rm", "--network=none", "--entrypoint=low-ports", built_image.name, *arguments
        )
        assert ran.returncode == status, ran.stderr
