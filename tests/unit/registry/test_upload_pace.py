"""The pace of uploads: that of the connection, with a limit for silence."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from obdelta.registry.http.request_bodies import CHUNK, BytesBody, FileBody
from obdelta.registry.http.transport import Http
from obdelta.registry.http.transport_errors import TransientUpstreamError
from tests.support.clients import running_threads


@implementer(IConsumer)
class Slow:
    """A consumer that pauses its producer after every write, as a slow connection does."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.body: FileBody | None = None
        self.came: Deferred[None] = Deferred()

    def registerProducer(self, producer: object, streaming: bool) -> None:
        raise AssertionError("a body is not registered")

    def unregisterProducer(self) -> None:
        raise AssertionError("a body is not registered")

    def write(self, data: bytes) -> None:
        assert self.body is not None
        self.written.append(data)
        self.body.pauseProducing()
        came, self.came = self.came, Deferred()
        came.callback(None)


@pytest_twisted.ensureDeferred
async def test_a_body_is_sent_at_the_pace_of_the_connection(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(CHUNK * 2 + 5)
    (tmp_path / "blob").write_bytes(content)
    moves: list[None] = []
    with running_threads() as threads:
        slow = Slow()
        body = slow.body = FileBody(tmp_path / "blob", len(content), threads)
        body.progressed = lambda: moves.append(None)
        came, done = slow.came, body.startProducing(slow)
        for number in (1, 2, 3):
            await came
            assert len(slow.written) == number and not done.called
            came = slow.came
            body.resumeProducing()
        await done
        assert b"".join(slow.written) == content and len(moves) == 3
        # Stopped in the middle: it never fires, and nothing more is written.
        slow = Slow()
        body = slow.body = FileBody(tmp_path / "blob", len(content), threads)
        came, done = slow.came, body.startProducing(slow)
        await came
        body.stopProducing()
        body.stopProducing()
        assert len(slow.written) == 1 and not done.called


@implementer(IAgent)
class Never:
    """An agent that accepts a request and never answers."""

    def __init__(self) -> None:
        self.started: Deferred[Any] = Deferred()

    def request(
        self, method: bytes, uri: bytes, headers: object = None, bodyProducer: object = None
    ) -> Deferred[Any]:
        return self.started


def test_the_idle_timer_restarts_when_bytes_leave() -> None:
    clock, agent = Clock(), Never()
    body = BytesBody(b"many bytes")
    outcome: list[Failure] = []
    http = Http(cast(Any, agent), clock, idle=60.0)
    ensureDeferred(http.request(b"PUT", "http://registry.example/", Headers(), body)).addErrback(
        outcome.append
    )
    for _ in range(5):
        clock.advance(59.0)
        body.progressed()
    assert not outcome
    clock.advance(60.0)
    assert outcome and outcome[0].check(TransientUpstreamError)
    body.progressed()  # too late, and harmless
    assert not clock.getDelayedCalls()
