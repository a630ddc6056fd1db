"""Checks for problems while pages are open: their number, and what follows from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.task import Clock

from obdelta.errors import UpstreamUnavailable
from obdelta.web.operators.pages.live_pages import (
    GATHER_SECONDS,
    REFRESH_SECONDS,
    WATCH_SECONDS,
    StatusPages,
)
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.operators.sse import EventStream
from tests.support.status_data import known


class Reader:
    """A double of a stream. It keeps the last block of problems."""

    def __init__(self) -> None:
        self.attention = ""

    def send(self, kind: str, data: str) -> None:
        if kind == "attention":
            self.attention = data


class Server:
    """Counts checks and refreshes of the pages that it serves."""

    def __init__(self) -> None:
        self.clock, self.checks, self.gathered = Clock(), 0, 0
        self.problem: str | None = None
        self.broken = False
        service = SimpleNamespace(watchers=[], running=[])
        catalogue = SimpleNamespace(named_images=SimpleNamespace(of=self.no_names))
        parts: tuple[Any, ...] = (service, catalogue, self.gather, self.watch, self.clock)
        self.pages = StatusPages(*parts)

    async def no_names(self, _digests: object) -> dict[str, str]:
        return {}

    async def gather(self) -> StatusData:
        self.gathered += 1
        return known(problems={"upstream": self.problem}, failures=[])

    async def watch(self) -> object:
        self.checks += 1
        if self.broken:
            raise UpstreamUnavailable("odd")
        return self.problem

    def reader(self) -> tuple[Reader, Any]:
        reader = Reader()
        return reader, self.pages._attach(cast(EventStream, reader), "")


def test_many_readers_share_one_check_and_get_a_problem_with_the_next_one() -> None:
    server = Server()
    readers = [server.reader() for _ in range(50)]
    server.clock.advance(GATHER_SECONDS)
    server.clock.advance(WATCH_SECONDS - GATHER_SECONDS)
    assert (server.checks, server.gathered) == (1, 1)
    assert all("hidden" in reader.attention for reader, _ in readers)
    server.problem = "cannot connect"
    server.clock.advance(WATCH_SECONDS)
    assert (server.checks, server.gathered) == (2, 2)
    assert all("cannot connect" in reader.attention for reader, _ in readers)
    assert WATCH_SECONDS + GATHER_SECONDS < 2 < REFRESH_SECONDS


def test_checks_that_find_nothing_new_read_no_figures_and_end_with_the_last_reader() -> None:
    server = Server()
    _, first_leaves = server.reader()
    _, second_leaves = server.reader()
    server.clock.pump([WATCH_SECONDS] * 4)
    assert server.checks == 4
    before = server.gathered
    server.clock.advance(WATCH_SECONDS / 2)
    assert server.gathered == before
    first_leaves()
    server.clock.pump([WATCH_SECONDS] * 3)
    assert server.checks == 7
    second_leaves()
    server.clock.pump([WATCH_SECONDS] * 100)
    assert server.checks == 7
    assert server.clock.getDelayedCalls() == []
    server.reader()
    server.clock.pump([WATCH_SECONDS] * 2)
    assert server.checks == 9


def test_a_check_that_fails_is_followed_by_others() -> None:
    server = Server()
    reader, _ = server.reader()
    server.broken = True
    server.clock.pump([WATCH_SECONDS] * 3)
    server.broken, server.problem = False, "full"
    server.clock.pump([WATCH_SECONDS, GATHER_SECONDS])
    assert server.checks == 4
    assert "full" in reader.attention
