"""`obdelta settings` as a user runs it."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
from pathlib import Path

import pytest

from obdelta.settings import read, table
from tests.support.commands import OBDELTA, error_of, run
from tests.support.server import command as command_of_a_server


def test_settings_prints_each_value_and_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tap.conf"
    file.write_text("[obdelta]\nrequest-timeout = 30\nlisten = tcp:8080\n    tcp:8081\n")
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("OBDELTA_MAX_DELTA_RATIO", "0.5")
    text = run("settings", "--config", file, "--effort", "small").stdout.decode()
    assert "# file\nrequest-timeout = 30\n" in text
    assert "# file\nlisten = tcp:8080\n    tcp:8081\n" in text
    assert "# environment OBDELTA_MAX_DELTA_RATIO\nmax-delta-ratio = 0.5\n" in text
    assert "# option\neffort = small\n" in text
    assert "# derived\nupstream = https://registry2.example.com\n" in text
    assert "# default\nstate-dir = /var/lib/obdelta\n" in text
    assert "#upstream-ca =\n" in text
    for row in table():
        assert f"{row.key} =" in text


def test_the_printed_settings_are_a_file_with_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("OBDELTA_LISTEN", "tcp:1\ntcp:2")
    file = tmp_path / "tap.conf"
    file.write_bytes(run("settings").stdout)
    assert configparser.ConfigParser(interpolation=None, delimiters=("=",)).read(file)
    assert read({}, {}, file) == read({}, os.environ)


def test_settings_are_printed_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("TOKEN_AUTH_BUILDER_TOKEN", "open sesame")
    shown = json.loads(run("settings", "--json", "--request-timeout", "30").stdout)["settings"]
    assert shown["request-timeout"] == {"value": "30", "origin": "option"}
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
        "[obdelta]\nrequest-timeout = 31\nupstream = https://r.example.com\npublic-url = https://d.example.com\n"
    )
    monkeypatch.setenv("OBDELTA_CONFIG", str(file))
    assert b"# file\nrequest-timeout = 31\n" in run("settings").stdout


def test_the_file_can_be_in_the_current_directory(tmp_path: Path) -> None:
    file = tmp_path / "tap.conf"
    file.write_text(
        "[obdelta]\nupstream = https://r.example.com\npublic-url = https://here.example.com\n"
    )
    assert (
        b"# file\npublic-url = https://here.example.com\n" in run("settings", cwd=tmp_path).stdout
    )
    os.chown(file, 65534, 65534)
    message = error_of(run("settings", cwd=tmp_path, status=2))
    assert "another user owns it: name it (-c tap.conf) to use it" in message
    run("settings", "-c", "tap.conf", cwd=tmp_path)


def test_all_errors_are_displayed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tap.conf"
    file.write_text("[obdelta]\nefort = small\nmax-builds = none\nmax-builds = 2\nwhat\n")
    command = [*OBDELTA, "settings", "-c", str(file), "--drain", "soon"]
    twistd = [*command_of_a_server(), "-c", str(file), "--drain", "soon"]
    for each in (command, twistd):
        ran = subprocess.run(each, capture_output=True, text=True, check=False)
        assert ran.returncode == 2
        assert ran.stderr.splitlines() == [
            f"obdelta: setting config has the value '{file}': expected key = value lines under"
            " [obdelta], but line 5 is not: it needs a key and a =",
            "obdelta: setting max-builds has the value 'given twice': expected one value"
            f" ({file}:3 and line 4)",
            f"obdelta: setting efort has the value 'small': expected a known key ({file}:2); did"
            " you mean effort?",
            "obdelta: setting upstream is missing: expected the URL of a registry"
            " (https://registry.example.com), without a path, or oci:DIR, as upstream in the file"
            " or OBDELTA_UPSTREAM",
            "obdelta: setting public-url is missing: expected the URL by which devices reach this"
            " server, without a path (https://delta.example.com), as public-url in the file or"
            " OBDELTA_PUBLIC_URL",
            "obdelta: setting drain has the value 'soon': expected seconds, such as 30 (from"
            " option)",
        ]


def test_twistd_names_wrong_usage_in_one_line_with_the_same_status() -> None:
    wrong = [*command_of_a_server(), "--effrot", "small"]
    ran = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "obdelta: option --effrot not recognized: see twistd obdelta --help\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "setting upstream is missing: expected the URL of a registry"),
        (
            ["--request-timeout", "soon"],
            "setting request-timeout has the value 'soon': expected seconds, such as 45"
            " (from option)",
        ),
        (["--upstream-credentials", "builder"], "setting builder-token is missing"),
        (
            ["--config", "/nowhere/tap.conf"],
            "setting config has the value '/nowhere/tap.conf': expected a file",
        ),
    ],
)
def test_unusable_settings_are_one_line_and_status_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTA_HOST", "delta.example.com")
    if arguments:
        monkeypatch.setenv("BALENA_TLD", "example.com")
    assert message in error_of(run("settings", *arguments, status=2))


def test_a_secret_cannot_be_given_as_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    run("settings", "--builder-token", "x", status=2)
