"""The layer over treq: its bodies and time-outs, with a clock that the test moves and connections
in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, fail
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

from obdelta.errors import UpstreamUnavailable
from obdelta.registry.http.bodies import HIGH, BodyReader, bounded_pool
from obdelta.registry.http.transport import Http, HttpResponse
from obdelta.registry.http.transport_errors import TransientUpstreamError
from tests.support.clients import Consumer, started

URL = "https://registry.example.com/v2/?signature=s3cret"


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
    """Answers with the test's responses."""

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
def test_connection_errors_have_clear_reasons(
    trouble: Exception, kind: type[UpstreamUnavailable], words: str
) -> None:
    http = Http(MemoryAgent(lambda: fail(trouble)), Clock())
    _, errors, _ = started(http.request(b"GET", URL, Headers()))
    assert [type(error) for error in errors] == [kind]
    assert words in str(errors[0]) and "s3cret" not in str(errors[0])


def test_a_missing_answer_times_out() -> None:
    clock, requests = Clock(), []

    def silent() -> Deferred[IResponse]:
        requests.append(Deferred[IResponse]())
        return requests[-1]

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
def test_a_client_that_left_gets_no_error(wrapped: bool) -> None:
    def silent() -> Deferred[IResponse]:
        def cancelled(requests: Deferred[IResponse]) -> None:
            if wrapped:  # as Twisted does after the request was sent
                requests.errback(ResponseNeverReceived([Failure(CancelledError())]))

        return Deferred(cancelled)

    clock = Clock()
    _, errors, running = started(Http(MemoryAgent(silent), clock).request(b"GET", URL, Headers()))
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError]
    assert clock.getDelayedCalls() == []


def state(response: MemoryResponse) -> str:
    """Returns the last command to its connection."""
    return str(response.transport.producerState)


def reader_of(response: MemoryResponse, clock: Clock) -> BodyReader:
    return HttpResponse(URL, response, clock, 60.0).reader()


def test_a_full_buffer_pauses_the_connection() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    response.send(bytes(HIGH - 1))
    assert response.transport.producerState == "producing"
    response.send(b"x")
    assert response.transport.producerState == "paused"
    clock.advance(10_000)  # we pause it: it does not hang
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


def test_a_reader_may_be_full_before_it_is_attached() -> None:
    response = MemoryResponse()
    response.early = bytes(HIGH)
    reader = reader_of(response, Clock())
    assert response.transport.producerState == "paused"
    assert len(started(reader.read())[0][0]) == HIGH
    assert response.transport.producerState == "producing"


def test_a_read_waits_for_the_requested_bytes() -> None:
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


def test_bytes_before_a_cut_are_delivered_first() -> None:
    response = MemoryResponse()
    reader = reader_of(response, Clock())
    response.send(b"some")
    response.end(ConnectionLost())
    assert started(reader.read(10))[0] == [b"some"]
    errors = started(reader.read(10))[1]
    assert isinstance(errors[0], TransientUpstreamError) and "dropped the connection" in str(
        errors[0]
    )


def test_a_stalled_body_is_cut() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    _, errors, _ = started(reader.read(10))
    clock.advance(60)
    assert isinstance(errors[0], TransientUpstreamError) and "sent nothing for 60 seconds" in str(
        errors[0]
    )
    assert response.transport.producerState == "stopped"


def test_closing_a_reader_closes_the_connection() -> None:
    clock, response = Clock(), MemoryResponse()
    reader = reader_of(response, clock)
    _, errors, running = started(reader.read())
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError]
    assert response.transport.producerState == "stopped" and clock.getDelayedCalls() == []
    response.end(ConnectionLost())
    reader.cancel()


def test_the_size_of_content_is_bounded() -> None:
    for length in (11, UNKNOWN_LENGTH):
        response = MemoryResponse(length=length)
        results, errors, _ = started(HttpResponse(URL, response, Clock(), 60.0).content(10))
        if not results:
            response.send(bytes(11))
        assert (results, errors) == ([None], [])
        assert response.transport.producerState == "stopped"


def test_a_long_pause_of_the_device_is_no_upstream_error() -> None:
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


def test_only_error_bodies_may_end_without_a_length() -> None:
    for status, whole in ((200, False), (206, False), (400, True), (503, True)):
        response, consumer = MemoryResponse(status), Consumer()
        results, errors, _ = started(HttpResponse(URL, response, Clock(), 60.0).deliver(consumer))
        response.send(b"abc")
        response.end(PotentialDataLoss())
        assert (len(results), len(errors)) == ((1, 0) if whole else (0, 1))


def test_a_connection_to_the_upstream_is_not_logged() -> None:
    """Twisted would log a line at the start of a connection, and another one at its end."""
    assert not bounded_pool(Clock())._factory.noisy
