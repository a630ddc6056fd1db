"""docs/commands.md and the help texts describe the command line completely."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from obdelta.cli.commands.server import deltas
from obdelta.cli.commands.server.status import builds_as_text, status_as_text
from obdelta.cli.main import make_parser
from obdelta.cli.options import STATUSES

PAGE = (Path(__file__).parents[3] / "docs/commands.md").read_text("utf-8")


TEXT_ONLY = ("completion", "serve", "worker", "init", "password", "help")
"""Commands without --json: their output is a script, a log or a file."""

ACTIONS = ("retry", "cancel", "drop", "pin", "unpin", "forget")
"""Commands that take IDs of the list."""


def commands() -> dict[str, argparse.ArgumentParser]:
    return dict(make_parser().commands().choices)


def test_every_command_has_a_section() -> None:
    headings = "\n".join(line for line in PAGE.splitlines() if line.startswith("## "))
    assert set(re.findall(r"`obdelta (\w+)`", headings)) == set(commands())
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| [`"))
    assert set(re.findall(r"\[`(\w+)`\]", table)) == set(commands())


def test_every_option_in_the_docs_exists() -> None:
    known = {name for parser in commands().values() for name in parser._option_string_actions}
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    # twistd's own options: --worker is the service form of `obdelta worker`.
    assert written <= known | {"--version", "--worker"}, written - known


def test_every_exit_status_is_in_the_docs() -> None:
    for status in re.findall(r"^  (\d+)  ", STATUSES, re.MULTILINE):
        assert f"\n| {status} |" in PAGE


def test_exit_statuses_of_every_command_are_documented() -> None:
    rows = PAGE.partition("### Statuses 1 and 3")[2].partition("\n## ")[0]
    documented = [
        name
        for line in rows.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    ]
    assert sorted(documented) == sorted(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_texts_fit_a_terminal(name: str) -> None:
    parser = commands()[name]
    assert parser.description and len(parser.description) > 20
    for line in parser.description.splitlines():
        assert len(line) <= 120
    assert "json" in vars(parser.parse_args(_minimal_arguments(name))) or name in TEXT_ONLY
    assert "](" not in parser.format_help()  # no markup of the docs


def _minimal_arguments(name: str) -> list[str]:
    """Returns the arguments that the parser requires."""
    pair = ["a/b", "a/c"]
    return {
        "explain": pair,
        "export": [*pair, "-o", "x"],
        "build": [*pair, "-o", "x"],
        "check": [*pair, "--server", "x"],
        "diff": [*pair, "-o", "x"],
        "patch": [*pair, "-o", "x"],
        "completion": ["bash"],
        "password": ["alice"],
        "prepare": pair,
        "token": ["inspect", "@x"],
        **{name: ["0" * 16] for name in ACTIONS},
    }.get(name, [])


IMAGE = {"repository": "v2/a", "digest": f"sha256:{'a' * 64}"}
DELTA: dict[str, Any] = {
    "id": "3f0c9a1be2d45678",
    "kind": "v3",
    "form": "gzip",
    "base": IMAGE,
    "target": IMAGE,
    "full_bytes": 2000,
    "delta_bytes": 1000,
    "seconds": 1.0,
    "created": 0,
    "served": 1,
}
ENTRY: dict[str, Any] = {
    **DELTA,
    "state": "failed",
    "pinned": False,
    "since": 0,
    "bytes": None,
    "saved": 0,
    "src": f"v2/a@{IMAGE['digest']}",
    "dest": f"v2/a@{IMAGE['digest']}",
    "names": {},
    "reason": "",
}
STATUS: dict[str, Any] = {
    "version": "1",
    "now": 1,
    "problems": {},
    "notes": [],
    "builds": {"running": 0, "queued": 0},
    "devices": 0,
    "served": {"deltas": 0, "full_bytes": 0, "delta_bytes": 0},
    "kept": {"deltas": 1, "usage": {}, "quota": 1},
    "deltas": [DELTA],
    "failures": [],
}
BUILD: dict[str, Any] = {
    "id": "3f0c9a1be2d45678",
    "state": "running",
    "seconds": 1,
    "waiting": 1,
    "progress": {},
    "pair": "v3 a -> b",
}


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("status", status_as_text(STATUS)),
        ("list --state failed", deltas.as_text([ENTRY], 1)),
        ("builds", builds_as_text([BUILD])),
    ],
)
def test_examples_have_the_columns_of_the_commands(command: str, text: str) -> None:
    example = PAGE.partition(f"    $ obdelta {command}\n")[2].partition("\n## ")[0]
    (head,) = (line for line in text.splitlines() if line.startswith("id "))
    columns = re.split(r"\s{2,}", head)
    shown = [re.split(r"\s{2,}", line.strip()) for line in example.splitlines()]
    assert columns in shown
