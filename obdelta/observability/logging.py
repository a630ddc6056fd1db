"""Logs: observers that write lines as text or JSON, levels by area, and the request ID of lines."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from string import Formatter
from typing import IO, Any

from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogFilterPredicate,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    PredicateResult,
    eventAsText,
    formatEvent,
    formatTime,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.observability.metrics import Metrics

REQUEST_ID_HEADER = b"x-request-id"
_request: ContextVar[str] = ContextVar("obdelta_request", default="")
_FIT_ID = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,64}", re.ASCII)
OWN = "obdelta."
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_PORT_NOTICE = re.compile(
    r"\S+(?: \(\S+\))* starting on (?:\d+|'.*')|"
    r"\((?:TCP|TLS) Port \d+ Closed\)|\(UNIX Port .* Closed\)"
)
"""Twisted's messages about ports, which name a class. The server logs its addresses instead."""
_QUIET = {"twisted.web.client": LogLevel.warn}
"""They log two lines for every connection to the upstream, so they are quiet by default."""

_FORMER_AREAS = {
    "web.site": ["web.devices.app"],
    "builds.coordinator": [
        "builds.service",
        "builds.scheduler",
        "builds.running_build",
        "builds.failures",
    ],
    "shared": ["builds.replicas"],
    "wiring": ["app"],
}
"""Names of areas up to 0.1.0, which existing settings may have, and what they are now."""


@implementer(ILogFilterPredicate)
class Levels:
    """A filter by level: the lowest level that is logged, by area; "" stands for all other areas.
    The levels can be replaced.
    """

    def __init__(self, levels: Mapping[str, str]) -> None:
        self.use(levels)

    def use(self, levels: Mapping[str, str]) -> None:
        """Replaces the levels for later events."""
        self._predicate = predicate(levels)

    def __call__(self, event: LogEvent) -> Any:
        """See ILogFilterPredicate."""
        if event.get("log_namespace") == "log_legacy" and _PORT_NOTICE.fullmatch(
            formatEvent(event)
        ):
            return PredicateResult.no
        return self._predicate(event)


def observer(log_format: str, levels: Mapping[str, str] | Levels, out: IO[Any]) -> ILogObserver:
    """Returns a log observer. ``log_format`` is ``text`` or ``json``. ``levels``: see
    :class:`Levels`.
    """
    write = FileLogObserver(out, as_json if log_format == "json" else as_text)
    return FilteringLogObserver(write, [levels if isinstance(levels, Levels) else Levels(levels)])


def predicate(levels: Mapping[str, str]) -> LogLevelFilterPredicate:
    """Returns a filter for these levels. Areas are packages or modules of obdelta (``registry``,
    ``web.devices.app``), or Twisted's.
    """
    found = LogLevelFilterPredicate(LogLevel.levelWithName(levels.get("", "info")))
    for namespace, level in _QUIET.items():
        found.setLogLevelForNamespace(namespace, level)
    for given, name in levels.items():
        for area in _FORMER_AREAS.get(given, [given] if given else []):
            namespace = area if area.partition(".")[0] == "twisted" else OWN + area
            found.setLogLevelForNamespace(namespace, LogLevel.levelWithName(name))
    return found


def current_request() -> str:
    """Returns the ID of the request that work is done for, "" outside of any request.

    Coroutines that start inside another inherit it, and Twisted keeps it over every await.
    """
    return _request.get()


def new_request_id() -> str:
    """Returns a new request ID: 16 hex digits."""
    return secrets.token_hex(8)


def begin_request(name: str) -> None:
    """Sets the request ID for this coroutine, and for those that it starts."""
    _request.set(name)


def within_request(name: str, function: Callable[[], None]) -> None:
    """Calls a function with its own request ID. The caller's context stays as it is."""

    def inside() -> None:
        begin_request(name)
        function()

    copy_context().run(inside)


def accepted_request_id(value: bytes | None) -> str | None:
    """Returns a request ID from a trusted sender, None for one that is unfit for a log
    line or a header.
    """
    return value.decode("ascii") if value is not None and _FIT_ID.fullmatch(value) else None


def request_of(event: LogEvent) -> str:
    """Returns an event's request ID: the one recorded in an event of another process, else the
    current one.
    """
    return str(event.get("request") or current_request())


def with_request(event: LogEvent) -> LogEvent:
    """Returns the event for another process, with its request ID recorded."""
    name = request_of(event)
    return {**event, "request": name} if name else event


def as_text(event: LogEvent) -> str | None:
    """Formats time, area, level, message and request ID as one line. Tracebacks follow, indented.

    External text cannot begin a line or move a terminal's cursor: see :func:`escaped`.
    """
    message = formatEvent(event)
    whole = eventAsText(event, includeTimestamp=False, includeSystem=False)
    if not whole:
        return None
    level = event.get("log_level")
    system = (
        event.get("log_system")
        or f"{event.get('log_namespace', '-')}#{getattr(level, 'name', '-')}"
    )
    name = request_of(event)
    line = f"{_moment(event, formatTime)} [{escaped(str(system))}] {escaped(message)}"
    traceback = whole[len(message) :].strip("\n").split("\n") if "log_failure" in event else []
    return (
        "\n\t".join([f"{line} request={escaped(name)}" if name else line, *map(escaped, traceback)])
        + "\n"
    )


def escaped(text: str) -> str:
    """Returns the text with control characters, line separators and direction marks as escapes such
    as ``\\n``, ``\\x1b``.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _moment(event: LogEvent, formatted: Callable[[float], str]) -> str:
    """Returns the event's time as text. An invalid time from another process
    becomes the present.
    """
    when = event.get("log_time")
    if isinstance(when, int | float):
        with suppress(ValueError, OverflowError, OSError):
            return formatted(when)
    return formatted(time.time())


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")


def as_json(event: LogEvent) -> str | None:
    """Formats one JSON object a line. ``fields`` are the fields of the message, and no others."""
    message = formatEvent(event)
    failure = event.get("log_failure")
    if not message and not isinstance(failure, Failure):
        return None
    level = event.get("log_level")
    record: dict[str, object] = {
        "time": _moment(event, _iso),
        "level": getattr(level, "name", "info"),
        "area": str(event.get("log_namespace") or "-").removeprefix(OWN),
        "message": message or (failure.getErrorMessage() if isinstance(failure, Failure) else ""),
    }
    if name := request_of(event):
        record["request"] = name
    if fields := _fields(event):
        record["fields"] = fields
    if isinstance(failure, Failure):
        record["traceback"] = failure.getTraceback()
    return json.dumps(record) + "\n"


def _fields(event: LogEvent) -> dict[str, object]:
    template = event.get("log_format")
    if not isinstance(template, str):
        return {}
    try:
        names = {part[1] for part in Formatter().parse(template) if part[1]}
    except ValueError:
        return {}
    found = {
        name: event[name] for name in sorted(names) if name in event and not name.startswith("log_")
    }
    return {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in found.items()
    }


@implementer(ILogObserver)
class LevelCounter:
    """Counts log messages by their level, except debug messages."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, event: LogEvent) -> None:
        """Counts one message."""
        level = event.get("log_level")
        if level is not None and level is not LogLevel.debug:
            self._metrics.log_messages.labels(level.name).inc()
