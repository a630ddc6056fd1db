"""docs/commands.md and the help texts describe the command line completely."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

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
