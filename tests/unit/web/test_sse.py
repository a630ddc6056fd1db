"""Streams of events to operators, and requests whose client leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from obdelta.web.operators.app import OperatorApp
from obdelta.web.operators.routes import Answer, Call, text
from obdelta.web.operators.sse import Events, EventStream, Readers
from tests.support.logs import logged
from tests.support.operators import GUARD, Reader


class Studio:
    """Sends to all listeners."""

    def __init__(self, clock: Clock, readers: Readers | None = None) -> None:
        self.streams: list[EventStream] = []
        self.operator_app, self._clock, self._readers = (
            OperatorApp(GUARD),
            clock,
            readers or Readers(2),
        )
        self.operator_app.routes.add("GET", "/events", self.events)

    async def events(self, call: Call) -> Answer:
        return Events(self.attach, self._clock, self._readers, call.client)

    def attach(self, stream: EventStream) -> Callable[[], None]:
        self.streams.append(stream)
        return lambda: self.streams.remove(stream)


def test_events_reach_their_reader_until_it_leaves() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    assert "text/event-stream" in reader.got()
    studio.streams[0].send("progress", "one\ntwo\rthree")
    assert "event: progress\ndata: one\ndata: two\ndata: three\n\n" in reader.got()
    clock.advance(15)
    assert ":\n\n" in reader.got()
    reader.leave()
    assert studio.streams == []
    assert not clock.getDelayedCalls()


def test_a_slow_reader_gets_the_newest_of_each_kind() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    reader.got()
    reader.producer().pauseProducing()
    for number in range(1000):
        studio.streams[0].send("progress", str(number))
    studio.streams[0].send("pair", "ready")
    clock.advance(60)
    assert reader.got() == ""
    reader.producer().resumeProducing()
    got = reader.got()
    assert got.count("data: ") == 2
    assert got.index("data: 999") < got.index("data: ready")
    reader.leave()


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    reader.producer().pauseProducing()
    clock.pump([15] * 7)
    assert not reader.cut()
    reader.producer().resumeProducing()
    clock.pump([15] * 20)
    assert not reader.cut()
    reader.producer().pauseProducing()
    clock.pump([15] * 9)
    assert reader.cut()
    reader.leave()
    assert studio.streams == []


def test_a_stream_may_end() -> None:
    clock = Clock()
    studio = Studio(clock)
    reader = Reader(studio.operator_app, clock, "GET /events")
    (stream,) = studio.streams
    stream.send("result", "42")
    stream.end()
    assert studio.streams == []
    assert reader.got().endswith("0\r\n\r\n")
    stream.send("more", "43")
    stream.end()
    assert reader.got() == ""
    reader.leave()


def test_the_number_of_readers_is_bounded() -> None:
    clock = Clock()
    studio = Studio(clock)
    readers = [Reader(studio.operator_app, clock, "GET /events") for _ in range(3)]
    assert ["429 Too Many" in reader.got() for reader in readers] == [False, False, True]
    readers[0].leave()
    assert "200 OK" in Reader(studio.operator_app, clock, "GET /events").got()


@pytest.mark.parametrize(("method", "called_off"), [("GET", True), ("POST", False)])
def test_a_client_that_leaves_cancels_only_reads(method: str, called_off: bool) -> None:
    clock, waiting, ended = Clock(), Deferred[None](), []

    async def slow(call: Call) -> Answer:
        try:
            await waiting
        except CancelledError:
            ended.append("called off")
            raise
        ended.append("done")
        return text("done")

    operator_app = OperatorApp(GUARD)
    operator_app.routes.add(method, "/slow", slow)
    with logged("warn", "error", "critical") as lines:
        reader = Reader(operator_app, clock, f"{method} /slow")
        reader.leave()
        if not called_off:
            waiting.callback(None)
    assert ended == ["called off" if called_off else "done"]
    assert lines == []


def test_one_client_does_not_take_the_streams_of_others() -> None:
    clock = Clock()
    studio = Studio(clock, Readers(4, of_client=2))
    request, other = "GET /events", "192.0.2.2"
    greedy = [Reader(studio.operator_app, clock, request) for _ in range(3)]
    answers = [reader.got() for reader in greedy]
    assert ["429 Too Many" in answer for answer in answers] == [False, False, True]
    assert "2 streams of events for one client at a time are the limit: close pages" in answers[2]
    assert "Retry-After: 10" in answers[2]
    assert "200 OK" in Reader(studio.operator_app, clock, request, other).got()
    greedy[0].leave()
    assert "200 OK" in Reader(studio.operator_app, clock, request).got()
    assert "200 OK" in Reader(studio.operator_app, clock, request, other).got()
    full = Reader(studio.operator_app, clock, request, "192.0.2.3").got()
    assert "4 streams of events at a time are the limit" in full
