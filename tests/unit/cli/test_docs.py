"""docs/commands.md, and the help texts, hold what the command line has."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from obdelta.cli.main import make_parser
from obdelta.cli.options import STATUSES

PAGE = (Path(__file__).parents[3] / "docs/commands.md").read_text("utf-8")


def commands() -> dict[str, argparse.ArgumentParser]:
    (made,) = [
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(made.choices)


def test_every_command_has_a_section() -> None:
    headings = "\n".join(line for line in PAGE.splitlines() if line.startswith("## "))
    assert set(re.findall(r"`obdelta (\w+)`", headings)) == set(commands())
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| [`"))
    assert set(re.findall(r"\[`(\w+)`\]", table)) == set(commands())


def test_every_option_in_the_docs_is_one() -> None:
    known = {name for parser in commands().values() for name in parser._option_string_actions}
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert written <= known | {"--version"}, written - known


def test_every_exit_status_is_in_the_docs() -> None:
    for status in re.findall(r"^  (\d+)  ", STATUSES, re.MULTILINE):
        assert f"\n| {status} |" in PAGE


def test_exit_statuses_of_every_command_are_told() -> None:
    rows = PAGE.partition("### Statuses 1 and 3")[2].partition("\n## ")[0]
    told = [
        name
        for line in rows.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    ]
    assert sorted(told) == sorted(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_texts_fit_a_terminal(name: str) -> None:
    parser = commands()[name]
    assert parser.description and len(parser.description) > 20
    for line in parser.description.splitlines():
        assert len(line) <= 120
    assert "json" in vars(parser.parse_args(_least(name))) or name == "completion"
    assert "](" not in parser.format_help()  # no markup of the docs


def _least(name: str) -> list[str]:
    """Arguments enough to be parsed."""
    pair = ["a/b", "a/c"]
    return {
        "explain": pair,
        "export": [*pair, "-o", "x"],
        "build": [*pair, "-o", "x"],
        "check": [*pair, "--server", "x"],
        "diff": [*pair, "-o", "x"],
        "patch": [*pair, "-o", "x"],
        "completion": ["bash"],
        "prepare": pair,
    }.get(name, [])
