"""Rules that every command follows: help of one screen, suggestions, quiet and verbose output,
errors as JSON, and no secret on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from obdelta.cli import tables
from obdelta.cli.commands.server.deltas import ACTIONS
from obdelta.cli.main import main, make_parser
from obdelta.cli.parser import Parser, SettingOption, WrongUsage, size
from obdelta.settings import table
from tests.support.commands import OBDELTA, environment, error_of, run

LINES = 40


def commands() -> dict[str, Parser]:
    return dict(make_parser().commands().choices)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_list_of_commands_fits_a_screen() -> None:
    shown = make_parser().format_help().splitlines()
    assert len(shown) <= LINES
    assert all(len(line) <= 80 for line in shown)
    for name in commands():
        assert any(line.split()[:1] == [name] for line in shown), name


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_help_of_a_command_fits_a_screen_and_names_every_option(name: str) -> None:
    parser = commands()[name]
    shown = parser.format_help()
    head = shown.partition("\nexamples:\n")[0].splitlines()
    assert len(shown.splitlines()) <= LINES
    assert all(len(line) <= 80 for line in head)
    for option, action in parser._option_string_actions.items():
        if not isinstance(action, SettingOption):
            assert option in shown
            assert action.help and action.help != argparse.SUPPRESS


def test_settings_are_listed_apart_with_their_defaults_and_values() -> None:
    shown = run("gc", "--help-settings").stdout.decode()
    for row in table():
        assert (f"--{row.key} " in shown) is not row.secret
    assert "--store-quota SIZE" in shown
    assert "--publish serve|registry" in shown
    assert " ".join(shown.split()).count("(default: 20 GiB)") == 1
    assert " X " not in shown and "](" not in shown and "`" not in shown
    assert "--store-quota" not in run("gc", "--help").stdout.decode()


def test_help_of_a_command_is_that_of_its_option() -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("help", "explain").stdout == run("explain", "--help").stdout
    assert "did you mean explain?" in error_of(run("help", "explian", status=2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stats", "unknown command stats: did you mean status?"),
        ("status --jsn", "unknown option --jsn: did you mean --json? (see: obdelta status --help)"),
        ("gc --store-quta=1", "unknown option --store-quta: did you mean --store-quota?"),
        ("status x", "unexpected argument 'x': there are too many"),
        ("zzz", "unknown command zzz (see: obdelta --help)"),
        ("status --zzz", "unknown option --zzz (see: obdelta status --help)"),
        ("explain a b --top -3", "--top: '-3' is no number from 0"),
        ("explain a b --top 1.5", "--top: '1.5' is no number from 0"),
        ("check a/b a/c --server x --wait -1", "--wait: '-1' is no duration"),
        ("check a/b a/c --server x --wait nan", "--wait: 'nan' is no duration"),
        ("list --limit 0", "--limit: '0' is no number from 1"),
        ("list --state gone", "--state: 'gone' cannot be used: the choices are kept, building"),
        ("retry x", "'x' is no ID of a delta: `obdelta list` shows them"),
        ("status -q -v", "not allowed with argument -q/--quiet"),
        ("explain a", "name two images, SRC and DEST, or an ID that `obdelta list` shows"),
    ],
)
def test_a_mistake_is_one_line_that_helps(line: str, message: str) -> None:
    assert message in error_of(run(*line.split(), status=2))


def test_an_error_is_json_on_stderr_where_json_was_wanted(tmp_path: Path) -> None:
    for arguments, status, kind in (
        (["status", "--jsn", "--json"], 2, "WrongUsage"),
        (["status", "--operator", "http://127.0.0.1:9", "--json"], 1, "ServerFault"),
        (["settings", "--effort", "x", "--json"], 2, "SettingsError"),
        (["diff", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", "--json"], 1, None),
    ):
        ran = run(*arguments, status=status)
        assert ran.stdout == b""
        for line in ran.stderr.splitlines():
            error = json.loads(line)["error"]
            assert error["status"] == status
            assert error["message"]
            assert kind in (None, error["type"])


NOBODY = "http://127.0.0.1:9"
USABLE = ["--upstream", "oci:/nothing", "--public-url", "http://x", "--auth", "none"]
PAIR = ["a/b", "a/c"]
FAILING = {
    "build": [*PAIR, *USABLE, "--effort", "x", "-o", "/nothing/here"],
    "check": [*PAIR, "--server", NOBODY],
    "completion": ["csh"],
    "diff": [*PAIR, "-o", "/nothing/here"],
    "doctor": ["--form", "x"],
    "explain": [*PAIR, "--operator", NOBODY],
    "export": [*PAIR, "--server", NOBODY, "-o", "/nothing/here"],
    "help": ["statsu"],
    "init": ["--for", "nothing"],
    "password": ["alice", "--password", "@/nothing/here"],
    "patch": [*PAIR, "-o", "/nothing/here"],
    "prepare": [*PAIR, "--operator", NOBODY],
    "serve": [*USABLE, "--effort", "x"],
    "settings": [*USABLE, "--effort", "x"],
    "token": ["inspect", "@/nothing/here"],
    "trace": ["name", "--operator", NOBODY],
    "verify": ["--state-dir", "/nothing/here"],
}
"""Arguments with which a command fails; the others fail where no server answers."""


def failing(name: str) -> list[str]:
    """Returns a line of a command that fails."""
    ids = ["0" * 16] if name in ACTIONS else []
    return [name, *FAILING.get(name, [*ids, "--operator", NOBODY])]


def status_of(line: list[str]) -> int:
    """Runs a command in this process and returns its exit status."""
    try:
        return main(line)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_fails_in_one_line_and_as_json(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    line = failing(name)
    for quiet in ([], ["--quiet"]):
        status = status_of([*line, *quiet])
        out, error = capsys.readouterr()
        assert status in (1, 2), (line, out)
        assert out == ""
        assert error.startswith("obdelta: ") and len(error.splitlines()) == 1
    json_status = status_of([*line, "--json"])
    out, error = capsys.readouterr()
    described = json.loads(error)["error"]
    assert out == ""
    assert described["status"] == json_status and described["type"] and described["message"]
    # One that takes --json fails in the same way with it.
    if "--json" in commands()[name]._option_string_actions:
        assert json_status == status
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_suggests_options_and_has_the_common_ones(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = commands()[name]._option_string_actions
    assert {"-q", "--quiet", "-v", "--verbose", "-h", "--help"} <= options.keys()
    # A mistyped option comes before arguments that are missing.
    assert main([name, "--quite"]) == 2
    assert "unknown option --quite: did you mean --quiet?" in capsys.readouterr().err
    assert status_of([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert main(["help", name]) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize("name", sorted(commands()))
def test_no_command_takes_a_secret_from_the_command_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    secret_keys = {f"--{row.key}" for row in table() if row.secret}
    options = commands()[name]._option_string_actions
    assert not secret_keys & options.keys()
    for option in ("--login", "--token", "--authorization", "--password"):
        if option not in options:
            continue
        assert "@FILE" in str(options[option].metavar)
        line = failing(name)
        if option == "--login":  # of the operators' endpoint
            line = ["--operator" if part == "--server" else part for part in line]
        assert status_of([*line, option, "s3cret:s3cret"]) == 2
        shown = "".join(capsys.readouterr())
        assert f"{option} must name a file" in shown
        assert "s3cret" not in shown


def test_verbose_prints_causes_and_quiet_prints_no_notices(tmp_path: Path) -> None:
    nobody = ("status", "--operator", "http://127.0.0.1:9")
    ran = run(*nobody, "--verbose", status=1).stderr.decode().splitlines()
    assert ran[0] == run(*nobody, status=1).stderr.decode().strip()
    assert any("because: ConnectionRefusedError" in line for line in ran[1:])
    file = tmp_path / "tap.conf"
    file.write_text(
        "[obdelta]\nworth = 0.5\nauth = none\nupstream = oci:/x\npublic-url = http://x\n"
    )
    notice = run("settings", "-c", file).stderr
    assert notice.startswith(b"obdelta: ") and b"worth" in notice
    assert run("settings", "-c", file, "--quiet").stderr == b""


def test_secrets_are_read_from_files_and_stdin_only(tmp_path: Path) -> None:
    pair = ("127.0.0.1:9/b", "127.0.0.1:9/c", "--server", "http://127.0.0.1:9")
    message = error_of(run("check", *pair, "--token", "secret", status=2))
    assert "--token must name a file, @FILE, or be -" in message and "secret" not in message
    missing = error_of(run("check", *pair, "--token", f"@{tmp_path}/missing", status=2))
    assert f"--token: {tmp_path}/missing cannot be read: No such file" in missing
    # With a token, the command connects to the network.
    ran = run("check", *pair, "--token", "-", stdin=b"secret\n", status=1)
    assert "Connection refused" in error_of(ran)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("5 B", 5), ("20 MiB", 20 << 20), ("1000000", 1_000_000), ("1.5kB", 1500)],
)
def test_sizes_with_units(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["5", "999999", "-1", "", "5 XB", "1e9", "\u0665"])
def test_sizes_that_may_be_a_mistake_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_a_table_has_the_width_and_colours_of_a_terminal_and_none_in_a_pipe() -> None:
    code = (
        "from obdelta.cli import tables; print(tables.table(['state', 'name'],"
        " [['failed', 'x' * 100]]))"
    )
    python = [OBDELTA[0].replace("obdelta", "python"), "-c", code]
    plain = subprocess.run(python, capture_output=True, check=True, env=environment()).stdout
    assert plain.decode().splitlines() == ["state   name", "failed  " + "x" * 100]
    own_end, child_end = pty.openpty()
    shown = {**environment(), "TERM": "xterm-256color", "COLUMNS": "60"}
    shown.pop("NO_COLOR", None)
    with subprocess.Popen(python, stdout=child_end, env=shown) as process:
        os.close(child_end)
        text = b""
        try:
            while piece := os.read(own_end, 65536):
                text += piece
        except OSError:  # reading a terminal whose other side is closed ends like this
            pass
        assert process.wait() == 0
    os.close(own_end)
    assert b"\x1b[31mfailed\x1b[0m" in text
    rows = text.decode().splitlines()
    assert len(rows) == 3  # the name is folded
    assert text.count(b"x") == 100


def test_a_count_of_one_is_singular() -> None:
    assert [tables.counted(count, "delta") for count in (0, 1, 1000)] == [
        "0 deltas",
        "1 delta",
        "1,000 deltas",
    ]


def test_parsing_has_no_side_effects() -> None:
    with pytest.raises(WrongUsage):
        make_parser().parse_args(["nothing"])
    assert main(["nothing"]) == 2
