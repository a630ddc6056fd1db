"""Captures the log of a block."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from twisted.logger import (
    ILogObserver,
    LogEvent,
    Logger,
    LogPublisher,
    formatEvent,
    globalLogPublisher,
)
from zope.interface import implementer

from obdelta.observability.logging import observer


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


class Written:
    """Returns what our observer writes."""

    def __init__(self, how: str = "text", **levels: str) -> None:
        self.out, self._publisher = io.StringIO(), LogPublisher()
        given = {name.replace("_", "."): level for name, level in levels.items() if name != "all_"}
        self._publisher.addObserver(
            observer(how, {"": levels.get("all_", "info"), **given}, self.out)
        )

    def log(self, namespace: str = "obdelta.web.devices.app") -> Logger:
        return Logger(namespace, observer=self._publisher)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()
