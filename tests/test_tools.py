"""`tools/debian-packages` and `tools/find-python`: what is there is left alone, what is missing is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
NOBODY = 65534


def as_ordinary_user(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        user=NOBODY if os.getuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A folder that everybody may read, with the tool in it (a checkout may lie where only its owner can look)."""
    tmp_path.chmod(0o755)
    for folder in list(tmp_path.parents)[:2]:
        folder.chmod(0o755)
    tool = tmp_path / "debian-packages"
    tool.write_bytes((TOOLS / "debian-packages").read_bytes())
    tool.chmod(0o755)
    return tmp_path


def test_what_is_missing_is_named_in_one_line(lists: Path) -> None:
    (lists / "list").write_text(
        "# comment\n\nno-such-package\nother-package  test -e /nowhere\nbash  command -v bash\n"
    )
    ran = as_ordinary_user(lists / "debian-packages", lists / "list")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "missing here: no-such-package other-package (as root on Debian: apt-get install no-such-package other-package)"
    ]


def test_what_is_there_is_left_alone(lists: Path) -> None:
    (lists / "list").write_text("dpkg\nno-such-package  command -v sh\n")
    ran = as_ordinary_user(lists / "debian-packages", lists / "list")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["build", "test"])
def test_the_lists_are_satisfied_here(name: str) -> None:
    python = subprocess.run([TOOLS / "find-python"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        [TOOLS / "debian-packages", TOOLS / f"debian-packages-{name}.txt"],
        env=os.environ | {"PYTHON": python},
        check=True,
    )


def test_a_python_that_is_too_old_is_not_taken(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    ran = subprocess.run(
        ["/bin/bash", TOOLS / "find-python"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("obdelta needs Python 3.11 or newer")
