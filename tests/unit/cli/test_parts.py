"""Parts of commands: text in columns, and the operators' endpoint from the settings."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.cli import tables
from obdelta.cli.operator_client import operator
from obdelta.errors import SettingsError


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=6))
def test_each_table_row_is_one_line_without_control_characters(
    rows: list[tuple[str, str]],
) -> None:
    text = tables.table(["left", ">right"], rows)
    lines = text.split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() and line == line.rstrip() for line in lines)


def test_a_table_is_aligned() -> None:
    rows = [["a", "1"], ["bcd", "1,000"]]
    assert tables.table(["name", ">bytes"], rows) == "name  bytes\na         1\nbcd   1,000"
    assert tables.fields([("a", "1"), ("long", "\x1b[31m")]) == "a     1\nlong  ?[31m"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_995, "10.0 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (21_474_836_480, "21.5 GB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_are_printed_with_units(count: int, text: str) -> None:
    assert tables.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 d")],
)
def test_ages_are_printed_in_words(seconds: float, text: str) -> None:
    assert tables.ago(seconds) == text


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("tcp:9100:interface=127.0.0.1", "http://127.0.0.1:9100"),
        ("tcp:9100", "http://127.0.0.1:9100"),
        ("tcp:port=9100:interface=0.0.0.0", "http://127.0.0.1:9100"),
        ("tcp:9100:interface=10.0.0.5", "http://10.0.0.5:9100"),
        (r"tcp6:9100:interface=\:\:1", "http://[::1]:9100"),
        (r"tcp6:9100:interface=\:\:", "http://[::1]:9100"),
        (r"unix:/run/obdelta/a\:b.sock:mode=660", "unix:/run/obdelta/a:b.sock"),
        ("unix:address=/run/x", "unix:/run/x"),
        ("systemd:domain=INET:index=0\nunix:/run/x", "unix:/run/x"),
    ],
)
def test_the_endpoint_follows_from_a_listening_string(
    listen: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBDELTA_OPERATOR_LISTEN", listen)
    assert operator(argparse.Namespace(operator=None, config=None, login=None)).displayed == url


def test_settings_without_an_operators_endpoint_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OBDELTA_OPERATOR_LISTEN", "ssl:9100")
    with pytest.raises(SettingsError, match="or use --operator"):
        operator(argparse.Namespace(operator=None, config=None, login=None))
