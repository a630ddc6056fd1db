"""Captures the log of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import implementer


@implementer(ILogObserver)
class _Observer:
    def __init__(self, levels: tuple[str, ...]) -> None:
        self.lines: list[str] = []
        self._levels = levels

    def __call__(self, event: LogEvent) -> None:
        if (
            str(event.get("log_namespace", "")).startswith("obdelta")
            and event["log_level"].name in self._levels
        ):
            self.lines.append(formatEvent(event))


@contextmanager
def logged(*levels: str) -> Iterator[list[str]]:
    """Yields a list that grows with the lines of these levels (``info``, ``warn``, ``error``,
    ``critical``).
    """
    observer = _Observer(levels)
    globalLogPublisher.addObserver(observer)
    try:
        yield observer.lines
    finally:
        globalLogPublisher.removeObserver(observer)
