"""Bodies hashed on the way to a consumer: the last bytes are sent only after the digest is
verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.concurrency.event import Waiters
from obdelta.oci import Digest
from obdelta.registry.http.bodies import BodyReader
from obdelta.registry.http.transport import HttpResponse, WrongContent

BATCH = 256 * 1024
"""Bytes hashed at once, in a thread. One batch is held back until the next has arrived."""
FLUSH_SECONDS = 0.2
"""Seconds after which fewer bytes are hashed and passed on."""

InThread = Callable[..., Awaitable[object]]


@implementer(IPushProducer)
class VerifiedDelivery:
    """The body of a response, for one consumer; see
    :attr:`obdelta.registry.upstream.ProxiedResponse.deliver`.

    The last bytes are not written if the body does not match ``digest``: the Deferred fails with
    WrongContent, and the caller cuts the connection. A body may end with the connection, since the
    digest shows whether it is complete.
    """

    def __init__(self, response: HttpResponse, digest: Digest, in_thread: InThread) -> None:
        self._response, self._digest, self._in_thread = response, digest, in_thread
        self._hasher = hashlib.sha256()
        self._resumed: Waiters[None] = Waiters()
        self._paused = self._stopped = False

    def start(self, consumer: IConsumer) -> Deferred[None]:
        """Streams the body. The Deferred fires once, at its end or with the failure."""
        done: Deferred[None] = Deferred(lambda _: self.stopProducing())

        def ended(outcome: Failure | None) -> None:
            consumer.unregisterProducer()
            if not done.called:
                done.callback(outcome)

        consumer.registerProducer(self, True)
        ensureDeferred(self._run(consumer)).addBoth(ended)
        return done

    async def _run(self, consumer: IConsumer) -> None:
        reader = self._response.reader()
        try:
            held = b""
            while batch := await self._read(reader):
                await self._in_thread(self._hasher.update, batch)
                await self._write(consumer, held)
                held = batch
            if self._hasher.hexdigest() != self._digest.hex:
                raise WrongContent(
                    f"{self._response.host} sent other bytes than those of {self._digest}"
                )
            await self._write(consumer, held)
        finally:
            self._response.cancel()

    async def _read(self, reader: BodyReader) -> bytes:
        try:
            return await reader.read(BATCH, FLUSH_SECONDS)
        except Exception:
            if self._stopped:
                raise CancelledError from None
            raise

    async def _write(self, consumer: IConsumer, chunk: bytes) -> None:
        if self._paused and not self._stopped:
            await self._resumed.wait()
        if self._stopped:
            raise CancelledError
        if chunk:
            consumer.write(chunk)

    def pauseProducing(self) -> None:
        """Pauses the delivery."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Resumes the delivery."""
        self._paused = False
        self._resumed.fire(None)

    def stopProducing(self) -> None:
        """Ends the delivery. May be called more than once."""
        self._stopped = True
        self._response.cancel()
        self._resumed.fire(None)
