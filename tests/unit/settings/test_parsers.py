"""Parsers of values, and rules for all settings."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.settings import Setting, Settings, all_rows, old_keys, parsers, read, table
from obdelta.tap import Options

NEEDED = {"upstream": "https://registry.example.com", "public-url": "https://delta.example.com"}
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1024", 1024),
        ("1 KiB", 1024),
        ("1kB", 1000),
        ("1.5 MiB", 3 << 19),
        ("10 GiB", 10 << 30),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_parsed(text: str, number: int) -> None:
    assert parsers.size(text) == number


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("0.5 Mbit/s", 500_000),
        ("2Mbit/s", 2_000_000),
        ("64 kbit/s", 64_000),
        ("1.25 Gbit/s", 1.25e9),
        ("metered", 0),
        ("auto", None),
    ],
)
def test_link_speeds_are_parsed(text: str, speed: float | None) -> None:
    assert parsers.link(text) == speed


@pytest.mark.parametrize(
    ("text", "seconds"), [("45", 45), ("0.5", 0.5), ("90 s", 90), ("10 min", 600), ("1h", 3600)]
)
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert parsers.duration(text) == seconds


def test_a_home_of_an_unknown_user_is_no_path() -> None:
    with pytest.raises(ValueError, match="~no-such-user has no home directory"):
        parsers.path("~no-such-user/state")


@given(st.sampled_from(table()), st.text(max_size=60))
def test_parsers_raise_nothing_but_value_errors(row: Setting, text: str) -> None:
    with contextlib.suppress(ValueError):
        row.parse(text)


def test_settings_are_frozen_and_each_field_is_a_key() -> None:
    settings = read(NEEDED, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.request_timeout = 3  # type: ignore[misc]
    assert {row.field for row in all_rows()} | {"origins", "texts", "notices"} == {
        f.name for f in dataclasses.fields(Settings)
    }
    variables = [name for row in all_rows() for name in row.environment]
    assert len(variables) == len(set(variables))
    assert len(set(old_keys())) == len(old_keys())
    assert not set(old_keys()) & {row.key for row in table()}


def test_help_texts_are_short_and_have_no_markup() -> None:
    for row in table():
        assert 10 < len(row.help) <= 200, row.key
        assert "](" not in row.help and "`" not in row.help, row.key
        assert not row.help.endswith((".", " ")), row.key
    usage = Options().getUsage(width=400)  # type: ignore[no-untyped-call]
    assert "--request-timeout=" in usage
    assert not any(f"--{key}=" in usage for key in old_keys())
    assert "](" not in usage and "`" not in usage


def test_the_documentation_has_every_setting() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "tools.settings_table", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_the_example_is_the_defaults_and_serves_on_openbalena() -> None:
    settings = read({}, {"BALENA_TLD": "example.com"}, ROOT / "tap.conf")
    assert settings == read({}, {"BALENA_TLD": "example.com"})
