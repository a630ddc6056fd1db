"""`tools/`: installed parts are left alone, missing ones are named; the prose linter refuses and
accepts.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

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
def lists() -> Iterator[Path]:
    """Makes a directory that everybody may read, with the tool in it. A checkout may be where only
    its owner can look, and so may the tests' own directories.
    """
    with TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        tool = folder / "debian-packages"
        tool.write_bytes((TOOLS / "debian-packages").read_bytes())
        tool.chmod(0o755)
        yield folder


def test_missing_parts_are_named_in_one_line(lists: Path) -> None:
    (lists / "list").write_text(
        "# comment\n\nno-such-package\nother-package  test -e /nowhere\nbash  command -v bash\n"
    )
    ran = as_ordinary_user(lists / "debian-packages", lists / "list")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "missing here: no-such-package other-package (as root on Debian: apt-get install"
        " no-such-package other-package)"
    ]


def test_installed_parts_are_not_installed_again(lists: Path) -> None:
    (lists / "list").write_text("dpkg\nno-such-package  command -v sh\n")
    ran = as_ordinary_user(lists / "debian-packages", lists / "list")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["build", "test"])
def test_all_listed_parts_are_installed_here(name: str) -> None:
    python = subprocess.run(
        [TOOLS / "find-python"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run(
        [TOOLS / "debian-packages", TOOLS / f"debian-packages-{name}.txt"],
        env=os.environ | {"PYTHON": python},
        check=True,
    )


def test_a_too_old_python_is_not_used(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    ran = subprocess.run(
        ["/bin/bash", TOOLS / "find-python"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("no Python 3.11 or newer is on PATH: ")


@pytest.fixture(scope="module")
def prose() -> Path:
    """The prose linter, installed as `make check` installs it."""
    subprocess.run(["make", "-s", "tools/prose/node_modules/.stamp"], cwd=TOOLS.parent, check=True)
    return TOOLS / "prose/check"


LONG = " ".join(["word"] * 36)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{LONG}.", "Exceeds the maximum word count of 35"),
        (f"- An item: {LONG}.", "Exceeds the maximum word count of 35"),
        ("It is for whoever pulls.", "whoever => anyone who"),
        ("| a | b |\n|---|---|\n| the asker | waits |", "asker => client"),
        ("What is damaged is listed.", "a sentence that begins with its subject"),
    ],
)
def test_the_prose_linter_refuses_words_of_the_list(
    prose: Path, tmp_path: Path, text: str, found: str
) -> None:
    (tmp_path / "page.md").write_text(f"# Title\n\n{text}\n")
    ran = subprocess.run([prose, tmp_path / "page.md"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert found in ran.stdout


def test_the_prose_linter_accepts_code_and_standard_terms(prose: Path, tmp_path: Path) -> None:
    page = (
        "# What it does\n\nThe client waits for `whoever`.\nWhat is a base?\n\n    client"
        f" {LONG}\n\n```\nasker\n```\n"
    )
    (tmp_path / "page.md").write_text(page)
    ran = subprocess.run([prose, tmp_path / "page.md"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
