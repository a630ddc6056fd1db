"""The seam over treq, its bodies and its patience, with a clock that the test moves and connections
in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, fail
from twisted.internet.error import ConnectionLost, ConnectionRefusedError, DNSLookupError
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from obdelta.errors import TooManyRequests, UpstreamUnavailable
from obdelta.registry.http.bodies import HIGH, BodyReader
from obdelta.registry.http.response_head_limit import bounded_pool
from obdelta.registry.http.retry import Backoff, Tries
from obdelta.registry.http.transport import Http, HttpResponse, TransientUpstreamError
from tests.support.clients import Consumer

T = TypeVar("T")
URL = "https://registry.example.com/v2/?signature=s3cret"


def started(work: Awaitable[T]) -> tuple[list[T], list[BaseException], Deferred[None]]:
    """Results and errors of what runs, as they come."""
    results: list[T] = []
    errors: list[BaseException] = []

    async def run() -> None:
        try:
            results.append(await work)
        except Exception as error:
            errors.append(error)

    return results, errors, ensureDeferred(run())


@implementer(IResponse)
class MemoryResponse:
    """A response whose body the test sends."""

    version = (b"HTTP", 1, 1)
    phrase = b"OK"
    request = previousResponse = None

    def __init__(self, code: int = 200, length: object = UNKNOWN_LENGTH) -> None:
        self.code, self.length, self.headers = code, length, Headers()
        self.transport = StringTransport()
        self.protocol: Protocol | None = None
        self.early = b""

    def deliverBody(self, protocol: Protocol) -> None:
        self.protocol = protocol
        protocol.makeConnection(self.transport)
        if self.early:
            protocol.dataReceived(self.early)
        self.transport.resumeProducing()

    def send(self, data: bytes) -> None:
        assert self.protocol is not None
        self.protocol.dataReceived(data)

    def end(self, reason: Exception | None = None) -> None:
        assert self.protocol is not None
        self.protocol.connectionLost(Failure(reason or ResponseDone("done")))

    def setPreviousResponse(self, response: object) -> None:
        """IResponse asks for it."""


@implementer(IAgent)
class MemoryAgent:
    """Answers with what the test makes."""

    def __init__(self, answer: Callable[[], Deferred[IResponse]]) -> None:
        self._answer = answer

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        return self._answer()


# -- asking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        (
            DNSLookupError("s3cret"),
            TransientUpstreamError,
            "the name of registry.example.com cannot be resolved",
        ),
        (
            ConnectionRefusedError(),
            TransientUpstreamError,
            "cannot connect to registry.example.com",
        ),
        (
            ResponseNeverReceived([Failure(ConnectionLost())]),
            TransientUpstreamError,
            "registry.example.com dropped",
        ),
        (
            ResponseNeverReceived(
                [Failure(SSL.Error([("SSL routines", "", "certificate verify failed")]))]
            ),
            UpstreamUnavailable,
            "no TLS connection to registry.example.com: certificate verify failed",
        ),
        (
            ResponseNeverReceived([Failure(VerificationError(errors=[]))]),
            UpstreamUnavailable,
            "the TLS certificate of registry.example.com is for another name",
        ),
        (
            ResponseNeverReceived([Failure(SSL.Error())]),
            UpstreamUnavailable,
            "the handshake failed",
        ),
    ],
)
def test_why_there_is_no_answer(
    trouble: Exception, kind: type[UpstreamUnavailable], words: str
) -> None:
    http = Http(MemoryAgent(lambda: fail(trouble)), Clock())
    _, errors, _ = started(http.request(b"GET", URL, Headers()))
    assert [type(error) for error in errors] == [kind]
    assert words in str(errors[0]) and "s3cret" not in str(errors[0])


def test_an_answer_that_never_comes() -> None:
    clock, asked = Clock(), []

    def silent() -> Deferred[IResponse]:
        asked.append(Deferred[IResponse]())
        return asked[-1]

    _, errors, _ = started(
        Http(MemoryAgent(silent), clock, idle=60.0).request(b"GET", URL, Headers())
    )
    clock.advance(59.9)
    assert errors == []
    clock.advance(0.1)
    assert isinstance(
        errors[0], TransientUpstreamError
    ) and "did not answer within 60 seconds" in str(errors[0])
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_whoever_leaves_is_not_told_of_trouble(wrapped: bool) -> None:
    def silent() -> Deferred[IResponse]:
        def cancelled(asked: Deferred[IResponse]) -> None:
            if wrapped:  # as Twisted does it once the request was sent
                asked.errback(ResponseNeverReceived([Failure(CancelledError())]))

        return Deferred(cancelled)

    clock = Clock()
    _, errors, running = started(Http(MemoryAgent(silent), clock).request(b"GET", URL, Headers()))
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError]
    assert clock.getDelayedCalls() == []


# -- bodies ------------------------------------------------------------------------------------


def state(response: MemoryResponse) -> str:
    """What its connection was told last."""
    return str(response.transport.producerState)


def reader_of(response: MemoryResponse, clock: Clock) -> BodyReader:
    return HttpResponse(URL, response, clock, 60.0).reader()


def test_a_reader_pauses_the_connection_when_nobody_reads() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    response.send(bytes(HIGH - 1))
    assert response.transport.producerState == "producing"
    response.send(b"x")
    assert response.transport.producerState == "paused"
    clock.advance(10_000)  # we hold it back: it does not hang
    results, errors, _ = started(reader.read(100))
    assert [len(content) for content in results] == [HIGH] and errors == []
    assert response.transport.producerState == "producing"
    clock.advance(59)
    response.send(b"y")
    clock.advance(59)
    response.end()
    assert clock.getDelayedCalls() == []
    assert started(reader.read())[0] == [b"y"]
    assert started(reader.read())[0] == [b""]


def test_a_reader_that_is_full_before_it_is_attached() -> None:
    response = MemoryResponse()
    response.early = bytes(HIGH)
    reader = reader_of(response, Clock())
    assert response.transport.producerState == "paused"
    assert len(started(reader.read())[0][0]) == HIGH
    assert response.transport.producerState == "producing"


def test_a_read_waits_for_as_much_as_was_asked_for() -> None:
    response = MemoryResponse()
    reader = reader_of(response, Clock())
    results, _, _ = started(reader.read(10))
    for _ in range(9):
        response.send(b"x")
    assert results == []
    response.send(b"xy")
    assert results == [b"xxxxxxxxxxy"]
    results, _, _ = started(reader.read(10))
    response.send(b"rest")
    response.end()
    assert results == [b"rest"]


def test_what_came_before_a_break_is_given_first() -> None:
    response = MemoryResponse()
    reader = reader_of(response, Clock())
    response.send(b"some")
    response.end(ConnectionLost())
    assert started(reader.read(10))[0] == [b"some"]
    errors = started(reader.read(10))[1]
    assert isinstance(errors[0], TransientUpstreamError) and "dropped the connection" in str(
        errors[0]
    )


def test_a_body_that_stops_is_given_up() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    _, errors, _ = started(reader.read(10))
    clock.advance(60)
    assert isinstance(errors[0], TransientUpstreamError) and "sent nothing for 60 seconds" in str(
        errors[0]
    )
    assert response.transport.producerState == "stopped"


def test_a_reader_that_is_left_closes_the_connection() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    _, errors, running = started(reader.read())
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError]
    assert response.transport.producerState == "stopped" and clock.getDelayedCalls() == []
    response.end(ConnectionLost())
    reader.cancel()


def test_content_is_bounded() -> None:
    for length in (11, UNKNOWN_LENGTH):
        response = MemoryResponse(length=length)
        results, errors, _ = started(HttpResponse(URL, response, Clock(), 60.0).content(10))
        if not results:
            response.send(bytes(11))
        assert (results, errors) == ([None], [])
        assert response.transport.producerState == "stopped"


def test_a_device_that_pauses_for_long_is_not_the_upstream_s_fault() -> None:
    clock, response, consumer = Clock(), MemoryResponse(length=6), Consumer()
    done = HttpResponse(URL, response, clock, 60.0).deliver(consumer)
    response.send(b"abc")
    assert consumer.producer is not None
    consumer.producer.pauseProducing()
    consumer.producer.pauseProducing()
    assert state(response) == "paused"
    clock.advance(100_000)
    assert not done.called
    consumer.producer.resumeProducing()
    consumer.producer.resumeProducing()
    assert state(response) == "producing"
    clock.advance(60)
    errors = started(done)[1]
    assert isinstance(errors[0], TransientUpstreamError) and bytes(consumer.content) == b"abc"
    assert not consumer.registered_now()
    response.end(ConnectionLost())
    assert clock.getDelayedCalls() == []


def test_a_body_without_an_end_is_whole_only_where_it_is_an_error() -> None:
    for status, whole in ((200, False), (206, False), (400, True), (503, True)):
        response, consumer = MemoryResponse(status), Consumer()
        results, errors, _ = started(HttpResponse(URL, response, Clock(), 60.0).deliver(consumer))
        response.send(b"abc")
        response.end(PotentialDataLoss())
        assert (len(results), len(errors)) == ((1, 0) if whole else (0, 1))


# -- patience ----------------------------------------------------------------------------------


def attempts(
    backoff: Backoff, error: Exception, seconds: float, takes: float = 0.0
) -> tuple[list[float], Exception]:
    """When the attempts began, in ``seconds`` seconds at most, each taking a while, and what came
    out.
    """
    clock, began = Clock(), list[float]()

    async def attempt() -> None:
        began.append(clock.seconds())
        if takes:
            done: Deferred[None] = Deferred()
            clock.callLater(takes, done.callback, None)
            await done
        raise error

    _, errors, _ = started(Tries(backoff, clock, lambda: 1.0).call(attempt))
    clock.pump([0.125] * int(seconds * 8))
    assert isinstance(errors[0], Exception)
    return began, errors[0]


def test_the_waits_double_up_to_a_bound() -> None:
    trouble = TransientUpstreamError("x")
    began, error = attempts(Backoff(attempts=6, first=0.5, most=3.0), trouble, 60)
    assert (began, error) == ([0.0, 0.5, 1.5, 3.5, 6.5, 9.5], trouble)


def test_chance_shortens_them_by_up_to_a_half() -> None:
    clock, began = Clock(), list[float]()

    async def attempt() -> None:
        began.append(clock.seconds())
        raise TransientUpstreamError("x")

    _, errors, _ = started(Tries(Backoff(attempts=3, first=1.0), clock, lambda: 0.0).call(attempt))
    clock.pump([0.25] * 100)
    assert began == [0.0, 0.5, 1.5] and len(errors) == 1


def test_retry_after_is_obeyed_within_bounds() -> None:
    backoff = Backoff(attempts=3, first=0.5, honoured=30.0)
    assert attempts(backoff, TooManyRequests("x", 20.0), 60)[0] == [0.0, 20.0, 40.0]
    assert attempts(backoff, TooManyRequests("x", 31.0), 60)[0] == [0.0]
    assert attempts(backoff, TooManyRequests("x"), 60)[0] == [0.0, 0.5, 1.5]


def test_what_takes_long_to_fail_is_not_tried_for_ever() -> None:
    began, _ = attempts(
        Backoff(attempts=5, first=0.5, patience=90.0), TransientUpstreamError("x"), 300, takes=60.0
    )
    assert began == [0.0, 60.5]


def test_other_errors_are_final() -> None:
    assert attempts(Backoff(), UpstreamUnavailable("x"), 10)[0] == [0.0]


def test_a_wait_can_be_cancelled() -> None:
    clock = Clock()

    async def attempt() -> None:
        raise TransientUpstreamError("x")

    _, errors, running = started(Tries(Backoff(), clock).call(attempt))
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError] and clock.getDelayedCalls() == []


def test_a_connection_to_the_upstream_is_not_logged() -> None:
    """Twisted would log a line when a connection begins, and another one at its end."""
    assert not bounded_pool(Clock())._factory.noisy
