"""The settings file: what it may hold, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdelta.errors import SettingsError
from obdelta.settings import read

NEEDED = {"upstream": "https://registry.example.com", "public-url": "https://delta.example.com"}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "tap.conf"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[obdelta]\nefort = 3\n", "setting efort has the value '3'"),
        ("[obdelta]\nrequest-timeout = 3\nrequest-timeout = 4\n", "setting request-timeout"),
        ("request-timeout = 3\n", "line 1"),
        ("[obdelta]\nrequest-timeout = 3\nnonsense\n", "line 3"),
        ("[obdelta]\n[other]\n", r"one section \[obdelta\], found \[other\]"),
        ("[DEFAULT]\nrequest-timeout = 3\n[obdelta]\n", r"found \[DEFAULT\]"),
        ("", r"a section \[obdelta\]"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as failure:
        read(NEEDED, {}, write(tmp_path, text))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("request-timeout = 3\n", "write [obdelta] in a line of its own before line 1"),
        ("[obdelta]\nauth: none\n", "but line 2 is not: it needs a key and a ="),
        ("[obdelta]\nauth = none # for now\n", "; a comment needs a line of its own"),
        ('[obdelta]\nauth = "none"\n', "; write it without quotes"),
    ],
)
def test_an_error_says_how_to_write_the_line(tmp_path: Path, text: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as failure:
        read(NEEDED, {}, write(tmp_path, text))
    assert str(failure.value).endswith(remedy)


def test_another_section_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as failure:
        read(NEEDED, {}, write(tmp_path, "[server]\nauth = none\n"))
    assert len(failure.value.each) == 1


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    """Editors on Windows write one."""
    file = write(tmp_path, "\ufeff[obdelta]\nauth = none\n")
    assert read(NEEDED, {}, file).auth == "none"


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read(NEEDED, {}, tmp_path / "none.conf")
    (tmp_path / "latin").write_bytes(b"[obdelta]\nrequest-timeout = \xff\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        read(NEEDED, {}, tmp_path / "latin")


def test_a_file_may_have_several_lines_colons_and_percent_signs(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "# comment\n[obdelta]\nlisten = tcp:8080\n    ssl:8443:privateKey=/a%b.pem\n;"
        " comment\nbuilder-token = 100%(x)s\n",
    )
    settings = read(NEEDED, {}, file)
    assert settings.listen == ("tcp:8080", "ssl:8443:privateKey=/a%b.pem")
    assert settings.builder_token == "100%(x)s"


def test_an_indented_key_is_named_and_its_value_is_not_displayed(tmp_path: Path) -> None:
    file = write(
        tmp_path, "[obdelta]\nauth-realm = https://api.example.com/x\n\n  builder-token = s3cret\n"
    )
    with pytest.raises(SettingsError) as failure:
        read(NEEDED, {}, file)
    [error] = failure.value.each
    assert str(error) == (
        "setting builder-token is missing: expected a line that begins with it: it is indented, so"
        f" it continues the value of auth-realm ({file}:2)"
    )


def test_areas_of_a_log_level_are_no_indented_keys(tmp_path: Path) -> None:
    file = write(tmp_path, "[obdelta]\nlog-level = info,\n  builds=debug\n")
    assert (
        read(NEEDED, {}, file).log_level
        == read({**NEEDED, "log-level": "info, builds=debug"}, {}).log_level
    )
