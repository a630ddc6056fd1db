"""The log: text and JSON, and levels by area."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from twisted.logger import LogEvent, LogLevel

from obdelta import settings
from obdelta.observability.logging import within_request
from tests.support.logs import Written


def test_a_text_line_names_its_request() -> None:
    written = Written()
    written.log().info("hello {who}", who="world")
    within_request("abc", lambda: written.log().info("hello {who}", who="you"))
    first, second = written.lines
    assert first.endswith("[obdelta.web.devices.app#info] hello world")
    assert second.endswith("[obdelta.web.devices.app#info] hello you request=abc")


def test_twisted_s_notices_of_ports_are_left_out() -> None:
    """The server logs its addresses itself."""
    written = Written()
    legacy = written.log("log_legacy")
    for notice in (
        "QuietSite starting on 8080",
        "QuietSite (TLS) starting on 8080",
        "QuietSite (TLS) (ProxiedFactory) starting on 8080",
        "QuietSite starting on '/run/obdelta/socket'",
        "(TCP Port 8080 Closed)",
        "(UNIX Port /run/obdelta/socket Closed)",
    ):
        legacy.info("{text}", text=notice)
    legacy.info("{text}", text="a plug-in starting on 8080 failed")
    written.log().info("{text}", text="QuietSite starting on 8080")
    assert len(written.lines) == 2


FORGED = "2026-01-01T00:00:00+0000 [x#info] forged"
HOSTILE = [
    (f"one\n{FORGED}", rf"one\n{FORGED}"),
    (f"one\r{FORGED}", rf"one\r{FORGED}"),
    (f"one\u2028{FORGED}\x85{FORGED}", rf"one\u2028{FORGED}\x85{FORGED}"),
    ("\x1b[2J\x1b]0;title\x07\x9b31m", r"\x1b[2J\x1b]0;title\x07\x9b31m"),
    ("\u202egnp.exe\u2066\ufeff", r"\u202egnp.exe\u2066\ufeff"),
    ("\ud800\x00\t\x7f", r"\ud800\x00\t\x7f"),
    ("Grüße, 世界", "Grüße, 世界"),
]


@pytest.mark.parametrize(("given", "shown"), HOSTILE)
def test_untrusted_text_is_escaped(given: str, shown: str) -> None:
    written = Written()
    within_request("abc", lambda: written.log().warn("{reason}", reason=given))
    (line,) = written.out.getvalue().split("\n")[:-1]
    assert line.endswith(f"[obdelta.web.devices.app#warn] {shown} request=abc")
    assert line.isprintable()


def test_a_traceback_is_indented_and_its_message_escaped() -> None:
    written = Written()
    try:
        raise RuntimeError(f"it broke\n{FORGED}\x1b[2J")
    except RuntimeError:
        written.log().failure("while at {work}", work=f"it\n{FORGED}")
    first, *rest = written.out.getvalue().split("\n")[:-1]
    assert first.endswith(rf"[obdelta.web.devices.app#critical] while at it\n{FORGED}")
    assert len(rest) > 3 and all(line.startswith("\t") and "\x1b" not in line for line in rest)
    assert any("RuntimeError: it broke" in line for line in rest)


@pytest.mark.parametrize("how", ["text", "json"])
@pytest.mark.parametrize("when", ["\n2026", None, float("nan"), 1e300, -1e300, [1], "12"])
def test_an_invalid_time_is_replaced_by_now(how: str, when: object) -> None:
    """Events of other server processes arrive as JSON."""
    written = Written(how)
    written._publisher(
        {"log_format": "x", "log_level": LogLevel.info, "log_namespace": "a\nb", "log_time": when}
    )
    (line,) = written.out.getvalue().split("\n")[:-1]
    assert line.startswith("20") if how == "text" else json.loads(line)["message"] == "x"


def test_json_has_the_fields_of_the_message_only() -> None:
    written = Written("json")
    within_request(
        "abc",
        lambda: written.log().info(
            "{path} {seconds} {who}", path="/\n", seconds=1.5, who=Path("x"), token="t"
        ),
    )
    (line,) = written.lines
    parsed = json.loads(line)
    assert parsed.pop("time").endswith("+00:00")
    assert parsed == {
        "level": "info",
        "area": "web.devices.app",
        "message": "/\n 1.5 x",
        "request": "abc",
        "fields": {"path": "/\n", "seconds": 1.5, "who": "x"},
    }


def test_json_of_a_failure_has_its_traceback() -> None:
    written = Written("json")
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        written.log().failure("while at {work}", work="it")
    parsed = json.loads(written.lines[0])
    assert (parsed["level"], parsed["message"]) == ("critical", "while at it")
    assert "RuntimeError: it broke" in parsed["traceback"]


def test_json_of_odd_events_is_valid() -> None:
    written = Written("json")
    for odd in (
        {"log_format": "{"},
        {"log_format": None},
        {"log_format": "plain"},
        {"log_text": "x", "log_format": "{log_text}"},
    ):
        event: LogEvent = {
            "log_level": LogLevel.info,
            "log_namespace": "obdelta.x",
            "log_time": 0.0,
            **odd,
        }
        written._publisher(event)
    parsed = [json.loads(line) for line in written.lines]
    assert [one["message"] for one in parsed][-2:] == ["plain", "x"]
    assert all("fields" not in one for one in parsed)


def test_each_area_may_have_its_level() -> None:
    written = Written(all_="warn", registry="debug", web_site="error", twisted_internet="info")
    for namespace in (
        "obdelta.registry.http.transport",
        "obdelta.web.devices.app",
        "obdelta.web.x",
        "obdelta.registryx",
        "twisted.internet.y",
    ):
        for level in (LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error):
            written.log(namespace).emit(level, "{n} {l}", n=namespace.split(".")[1], l=level.name)
    assert [line.partition("] ")[2] for line in written.lines] == [
        "registry debug",
        "registry info",
        "registry warn",
        "registry error",
        "web error",
        "web warn",
        "web error",
        "registryx warn",
        "registryx error",
        "internet info",
        "internet warn",
        "internet error",
    ]


def test_the_setting_of_levels_is_parsed() -> None:
    given = {
        "upstream": "oci:/x",
        "public-url": "http://x",
        "auth": "none",
        "log-level": "warn, registry=debug web.site=info",
    }
    found = settings.read(given, {}, None)
    assert found.log_level == {"": "warn", "registry": "debug", "web.site": "info"}
    assert settings.read({**given, "log-level": "net=error"}, {}, None).log_level == {
        "": "info",
        "net": "error",
    }
