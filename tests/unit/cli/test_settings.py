"""`obdelta settings` as a user runs it."""

from __future__ import annotations

import configparser
import json
import os
from pathlib import Path

import pytest

from obdelta.settings import read, table
from tests.support.commands import error_of, run


def test_it_prints_what_is_in_force_and_where_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tap.conf"
    file.write_text("[obdelta]\nhold = 30\nlisten = tcp:8080\n    tcp:8081\n")
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("OBDELTA_WORTH", "0.5")
    text = run("settings", "--config", file, "--effort", "small").stdout.decode()
    assert "# file\nhold = 30\n" in text
    assert "# file\nlisten = tcp:8080\n    tcp:8081\n" in text
    assert "# environment OBDELTA_WORTH\nworth = 0.5\n" in text
    assert "# option\neffort = small\n" in text
    assert "# derived\nupstream = https://registry2.example.com\n" in text
    assert "# default\nstate-dir = /var/lib/obdelta\n" in text
    assert "#upstream-ca =\n" in text
    for row in table():
        assert f"{row.key} =" in text


def test_what_it_prints_is_a_file_that_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("OBDELTA_LISTEN", "tcp:1\ntcp:2")
    file = tmp_path / "tap.conf"
    file.write_bytes(run("settings").stdout)
    assert configparser.ConfigParser(interpolation=None, delimiters=("=",)).read(file)
    assert read({}, {}, file) == read({}, os.environ)


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("TOKEN_AUTH_BUILDER_TOKEN", "open sesame")
    shown = json.loads(run("settings", "--json", "--hold", "30").stdout)["settings"]
    assert shown["hold"] == {"value": "30", "origin": "option"}
    assert shown["upstream-ca"] == {"value": None, "origin": "default"}
    assert shown["builder-token"] == {
        "value": "***",
        "origin": "environment TOKEN_AUTH_BUILDER_TOKEN",
    }
    assert list(shown) == [row.key for row in table()]


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("TOKEN_AUTH_BUILDER_TOKEN", "open sesame")
    ran = run("settings", "--upstream-credentials", "builder")
    assert b"# environment TOKEN_AUTH_BUILDER_TOKEN\nbuilder-token = ***\n" in ran.stdout
    assert b"sesame" not in ran.stdout + ran.stderr


def test_the_file_can_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tap.conf"
    file.write_text(
        "[obdelta]\nhold = 31\nupstream = https://r.example.com\npublic-url = https://d.example.com\n"
    )
    monkeypatch.setenv("OBDELTA_CONFIG", str(file))
    assert b"# file\nhold = 31\n" in run("settings").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "setting upstream is missing: expected the URL of a registry"),
        (
            ["--hold", "soon"],
            "setting hold has the value 'soon': expected seconds, such as 45 (from option)",
        ),
        (["--upstream-credentials", "builder"], "setting builder-token is missing"),
        (
            ["--config", "/nowhere/tap.conf"],
            "setting config has the value '/nowhere/tap.conf': expected a file",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments:
        monkeypatch.setenv("BALENA_TLD", "example.com")
    assert message in error_of(run("settings", *arguments, status=2))


def test_a_secret_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    run("settings", "--builder-token", "x", status=2)
