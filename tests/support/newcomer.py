"""A newcomer's checkout, and the package installed from it as the quickstart says: made once for
all tests (``tests/conftest.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import ROOT, blocks

_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BALENA_TLD")
"""Variables that would lead a process back to this checkout, and to its settings."""


def tracked() -> list[str]:
    """Returns the files of the checkout, without those that were removed and not committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_tracked(folder: Path, *places: str) -> Path:
    """Copies the tracked files into a directory and returns it: nothing else of a work tree is
    needed. If ``places`` are given, only files below them are copied.
    """
    for name in tracked():
        if not places or name.startswith(places):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def clean_environment() -> dict[str, str]:
    """Returns the environment of a shell, without this checkout's settings and packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _HIDDEN and not name.startswith("OBDELTA_")
    }


def bash(script: str, checkout: Path, *before: str) -> str:
    """Runs commands in the checkout; returns their output, and fails if one of them does.
    apt-get only simulates.
    """
    simulating = checkout.parent / "apt.conf"
    simulating.write_text('APT::Get::Simulate "true";\n')
    python = str(Path(sys.base_prefix) / "bin")
    own = {"APT_CONFIG": str(simulating), "PATH": f"{python}:{os.environ['PATH']}"}
    ran = subprocess.run(
        [*before, "bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=clean_environment() | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Yields a copy of the tracked files, after the quickstart's installation into its ``venv``."""
    checkout = copy_tracked(tmp_path_factory.mktemp("newcomer") / "obdelta")
    install = [
        block.commands for block in blocks("docs/quickstart.md") if block.section == "Install"
    ]
    bash("\n".join(install), checkout)
    return checkout
