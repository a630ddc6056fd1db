"""Responses as they arrive: heads of a bounded length, and bodies, complete or cut by the upstream.

A body is read in batches or delivered to a consumer. Nothing is buffered beyond a limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast
from typing import Protocol as TypingProtocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IDelayedCall,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web._newclient import HEADER, STATUS, HTTP11ClientProtocol
from twisted.web.client import HTTPConnectionPool, ResponseDone, _HTTP11ClientFactory
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse
from zope.interface import implementer

HIGH = 1024 * 1024
"""Bytes that a reader buffers at most (and one reception more) before it pauses the connection."""
MAX_HEAD = 256 * 1024
"""Bytes of everything before a body, and perhaps the body's first bytes."""


class _Transport(TypingProtocol):
    """The transport that Twisted gives to a body's protocol."""

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...
    def stopProducing(self) -> None: ...


class _Body(Protocol, ABC):
    """Base of both kinds: the idle timer, and pausing that is not lost while the body is attached.

    ``cut(why)`` makes the error for a body that broke off. The timer stops while this side pauses
    the upstream.
    """

    def __init__(self, clock: IReactorTime, idle: float, cut: Callable[[str], Exception]) -> None:
        self._clock, self._idle, self._cut = clock, idle, cut
        self._timer: IDelayedCall | None = None
        self._attached = self._paused = self._ended = self._stopped = False

    def attach(self, response: IResponse) -> None:
        """Starts to receive."""
        if not self._paused and not self._stopped:
            self._start_timer()
        response.deliverBody(self)
        self._attached = True
        # deliverBody ends by resuming the connection, even if it was paused while buffered bytes
        # were delivered.
        if self._stopped:
            self._connection.stopProducing()
        elif self._paused and not self._ended:
            self._connection.pauseProducing()

    @property
    def _connection(self) -> _Transport:
        return cast(_Transport, self.transport)

    def _pause(self) -> None:
        if not self._paused and not self._ended:
            self._paused = True
            self._stop_timer()
            if self._attached:
                self._connection.pauseProducing()

    def _resume(self) -> None:
        if self._paused and not self._ended:
            self._paused = False
            self._start_timer()
            if self._attached:
                self._connection.resumeProducing()

    def _stop(self) -> None:
        """Closes the connection; ``connectionLost`` follows, at once or soon."""
        self._stopped = True
        self._stop_timer()
        if self._attached and not self._ended:
            # Not loseConnection: over TLS that waits for the other side, which may still have much
            # to send.
            self._connection.stopProducing()

    def _start_timer(self) -> None:
        self._timer = self._clock.callLater(self._idle, self._timed_out)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _reset_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.reset(self._idle)

    def _timed_out(self) -> None:
        self._timer = None
        self._failed(self._cut(f"sent nothing for {self._idle:g} seconds in the middle of a body"))
        self._stop()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Handles the end of the body, complete or not."""
        self._ended = True
        self._stop_timer()
        if reason.check(ResponseDone):
            self._completed()
        elif reason.check(PotentialDataLoss):
            self._ended_with_connection()
        else:
            self._failed(self._cut("dropped the connection in the middle of a body"))

    @abstractmethod
    def _completed(self) -> None:
        """Handles a complete body."""

    @abstractmethod
    def _ended_with_connection(self) -> None:
        """Handles a body without a length whose connection was closed."""

    @abstractmethod
    def _failed(self, error: Exception) -> None:
        """Handles a body that will not be complete. May be called after this side cancelled it."""


class BodyReader(_Body):
    """A body read on request. Holds at most HIGH bytes and one reception; then the upstream
    waits.
    """

    def __init__(self, clock: IReactorTime, idle: float, cut: Callable[[str], Exception]) -> None:
        super().__init__(clock, idle, cut)
        self._kept: list[bytes] = []
        self._size = 0
        self._error: Exception | None = None
        self._whole = False
        self.ended_with_connection = False
        self._read_wait: Deferred[None] | None = None
        self._minimum = 0

    async def read(self, minimum: int = 1, flush_after: float | None = None) -> bytes:
        """Returns the received bytes once they reach ``minimum`` (at most HIGH) or the end; ``b""``
        after the end.

        After ``flush_after`` seconds fewer bytes are enough: a client waits for what a slow
        upstream sends.

        If the body breaks off, raises the error that ``cut`` makes, after the earlier bytes were
        returned. One read at a time. Cancelling closes the connection.
        """
        if self._size < minimum and self._error is None and not self._whole:
            self._minimum = minimum
            self._read_wait = Deferred(self._left)
            timer = None if flush_after is None else self._clock.callLater(flush_after, self._flush)
            try:
                await self._read_wait
            finally:
                self._read_wait = None
                if timer is not None and timer.active():
                    timer.cancel()
        if not self._kept and self._error is not None:
            raise self._error
        content = b"".join(self._kept)
        self._kept.clear()
        self._size = 0
        self._resume()
        return content

    def cancel(self) -> None:
        """Closes the connection unless the body is complete, and drops buffered bytes. May be
        called at any time.
        """
        self._kept.clear()
        self._size = 0
        self._failed(self._cut("was cancelled in the middle of a body"))
        self._stop()

    def _left(self, client: Deferred[None]) -> None:
        self._read_wait = None
        self.cancel()

    def dataReceived(self, data: bytes) -> None:
        """Buffers the bytes for the next read."""
        self._reset_timer()
        if self._error is not None:
            return
        self._kept.append(data)
        self._size += len(data)
        if self._size >= HIGH:
            self._pause()
        if self._size >= self._minimum:
            self._wake()

    def _flush(self) -> None:
        self._minimum = 1
        if self._size:
            self._wake()

    def _wake(self) -> None:
        if self._read_wait is not None and not self._read_wait.called:
            self._read_wait.callback(None)

    def _completed(self) -> None:
        self._whole = True
        self._wake()

    def _ended_with_connection(self) -> None:
        # The caller has a digest or a syntax that shows whether the body is complete.
        self.ended_with_connection = True
        self._completed()

    def _failed(self, error: Exception) -> None:
        if self._error is None and not self._whole:
            self._error = error
            self._wake()


@implementer(IPushProducer)
class BodyDelivery(_Body):
    """A body delivered to a consumer, at its pace."""

    def __init__(
        self,
        consumer: IConsumer,
        clock: IReactorTime,
        idle: float,
        cut: Callable[[str], Exception],
        *,
        may_end_with_connection: bool,
    ) -> None:
        super().__init__(clock, idle, cut)
        self._consumer = consumer
        self._may_end_with_connection = may_end_with_connection
        self._done: Deferred[None] | None = None

    def start(self, response: IResponse) -> Deferred[None]:
        """Streams; the Deferred fires once, at the end or with the failure."""
        done: Deferred[None] = Deferred(lambda _: self.cancel())
        self._done = done
        self._consumer.registerProducer(self, True)
        # Also if the consumer has stopped this producer already: only an attached body can be
        # closed.
        self.attach(response)
        return done

    def dataReceived(self, data: bytes) -> None:
        """Passes the bytes to the consumer."""
        self._reset_timer()
        if self._done is not None:
            self._consumer.write(data)

    def pauseProducing(self) -> None:
        """Pauses the upstream."""
        self._pause()

    def resumeProducing(self) -> None:
        """Resumes the upstream."""
        self._resume()

    def stopProducing(self) -> None:
        """Ends the delivery. May be called more than once."""
        self.cancel()

    def cancel(self) -> None:
        """Closes the connection unless the body is complete. May be called at any time."""
        self._finish(Failure(CancelledError()))
        self._stop()

    def _finish(self, failure: Failure | None) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        self._consumer.unregisterProducer()
        if failure is None:
            done.callback(None)
        else:
            done.errback(failure)

    def _completed(self) -> None:
        self._finish(None)

    def _ended_with_connection(self) -> None:
        if self._may_end_with_connection:
            self._finish(None)
        else:
            self._failed(self._cut("sent a body without its length"))

    def _failed(self, error: Exception) -> None:
        self._finish(Failure(error))


class _BoundedHead(HTTP11ClientProtocol):
    """A connection that is cut if a head is too long: Twisted's own has no bound."""

    transport: Any
    _head = 0

    def request(self, request: Any) -> Any:
        """Resets the count, and keeps the ``Connection`` header, which Twisted hides: it names the
        headers that must not be passed on.
        """
        self._head = 0
        answer = super().request(request)
        parser: Any = self._parser
        if parser is not None:
            received = parser.headerReceived

            def header_received(name: bytes, value: bytes) -> None:
                received(name, value)
                if name.lower() == b"connection":
                    parser.headers.addRawHeader(name, value)

            parser.headerReceived = header_received
        return answer

    def dataReceived(self, data: bytes) -> None:
        """Counts the bytes of a head, and passes on those of a body."""
        parser: Any = self._parser
        if parser is not None and parser.state in (STATUS, HEADER):
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.abortConnection()
                return
        super().dataReceived(data)  # type: ignore[no-untyped-call] # Twisted's


class _BoundedHeads(_HTTP11ClientFactory):
    noisy = False

    def buildProtocol(self, addr: IAddress | None) -> _BoundedHead:
        return _BoundedHead(self._quiescentCallback)  # type: ignore[no-untyped-call] # Twisted's


def bounded_pool(reactor: IReactorTime) -> HTTPConnectionPool:
    """Returns a pool of connections with :data:`MAX_HEAD`."""
    pool = HTTPConnectionPool(reactor)
    pool._factory = _BoundedHeads  # no public API sets its connections
    return pool
