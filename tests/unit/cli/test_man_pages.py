"""The manual pages: one for each command, with each option, and without warnings of man(1)."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from obdelta.cli.main import make_parser
from obdelta.cli.parser import SettingOption
from obdelta.settings import table
from tools.man_pages import commands, escaped, pages

PAGES = pages()
COMMANDS = commands(make_parser())


def shown(name: str, folder: Path) -> str:
    """Returns the page as man displays it; groff reports no error."""
    path = folder / name
    path.write_text(PAGES[name], "utf-8")
    ran = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", path],
        capture_output=True,
        check=True,
        text=True,
    )
    assert ran.stderr == ""
    return ran.stdout


def test_each_command_has_a_page() -> None:
    assert set(PAGES) == {"obdelta.1", "tap.conf.5", *(f"obdelta-{name}.1" for name in COMMANDS)}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_page_has_every_option_of_its_command(name: str, tmp_path: Path) -> None:
    text = shown(f"obdelta-{name}.1", tmp_path)
    summary, parser = COMMANDS[name]
    assert f"obdelta-{name} - {summary}" in " ".join(text.split())
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS"):
        assert f"\n{title}\n" in text
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, SettingOption):
            continue
        for option in action.option_strings:
            assert option in text


def test_the_first_page_names_every_command(tmp_path: Path) -> None:
    text = shown("obdelta.1", tmp_path)
    for name in COMMANDS:
        assert f"obdelta-{name}(1)" in text


def test_the_page_of_the_settings_has_each_of_them(tmp_path: Path) -> None:
    text = shown("tap.conf.5", tmp_path)
    for row in table():
        assert f"{row.key} = " in text
        assert row.environment[0] in text


def test_no_text_is_read_as_a_roff_request() -> None:
    assert escaped(".so /etc/passwd") == r"\&.so /etc/passwd"
    assert escaped(r"'\n-") == r"\&'\en\-"
