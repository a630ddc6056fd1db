"""The units of systemd: its own checks, and a booted systemd that runs them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.booted import INSTALLED, booted
from tests.support.deploy_files import DEPLOY
from tests.support.server import command

EXPOSURE_LIMIT = 1.7
"""Points out of 10, as systemd weighs them: most of the rest is for its access to the network."""


@pytest.fixture
def units(tmp_path: Path) -> Iterator[Path]:
    """Returns the units with the program's path in this checkout, because systemd checks that it
    exists.
    """
    for unit in (DEPLOY / "systemd").iterdir():
        text = unit.read_text().replace("/opt/obdelta/bin/twistd", command()[0])
        (tmp_path / unit.name).write_text(text)
    yield tmp_path


def test_systemd_takes_the_units(units: Path) -> None:
    ran = subprocess.run(
        ["systemd-analyze", "verify", units / "obdelta.service", units / "obdelta.socket"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in ran.stderr.splitlines() if "obdelta" in line]
    assert (ran.returncode, ours) == (0, [])


def test_the_service_is_hardened(units: Path) -> None:
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", units / "obdelta.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level for obdelta.service: ([0-9.]+)", ran.stdout)
    assert found is not None, ran.stdout
    assert float(found[1]) <= EXPOSURE_LIMIT


def test_a_booted_systemd_runs_the_units(tmp_path: Path) -> None:
    """The whole sandbox is in force (tests/support/booted.py), and builds of both kinds work in
    it.
    """
    found, log = booted("tests.support.booted", tmp_path), tmp_path / "log"
    # Only the socket was started; the first connection started the service, and both address
    # families are served.
    assert (found["before"], found["first"], found["by_ipv6"]) == ("inactive", "ok\n", "ok\n")
    assert found["shown"] == {"ActiveState": "active", "NRestarts": "0", "DynamicUser": "yes"}
    assert 61184 <= int(found["Uid"]) <= 65519  # systemd's range of dynamic users
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert (found["is_delta"], found["updated"]) == (True, True)
    assert (found["v2_version"], found["v2_full_pull"]) == (2, False)
    assert found["private"] == "0o700" and "catalogue.sqlite" in found["state"]
    # `systemctl reload` takes effect, and ends nothing.
    assert found["reloaded"] is True and "reload: done" in log.read_text()
    # Connections that came while the service was stopped waited for its next start.
    assert found["waited"] == "ok\n,ok\n"
    assert found["after"] == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    # The commands of docs/systemd.md that start and remove it.
    assert found["installed"] == list(INSTALLED)
    assert (found["enabled"], found["started"]) == (["enabled", "enabled"], "ok\n")
    assert (found["left"], found["loaded"]) == ([], ["not-found", "not-found"])
    assert found["open"] is False
    assert "Traceback" not in log.read_text()
