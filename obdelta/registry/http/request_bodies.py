"""Request bodies of known length, read off the reactor thread at the pace of the connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer
from twisted.python.failure import Failure
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from obdelta.concurrency.tasks import Threads, Waiters

CHUNK = 256 * 1024
"""Bytes read at once. With fewer, switching threads costs more than the work."""


@implementer(IBodyProducer)
class Body(ABC):
    """The body of one request, for one use. ``length`` in bytes is announced, so nothing is sent in
    chunks.

    ``progressed`` is called whenever bytes were sent; the HTTP client sets it to reset its idle
    timer.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.progressed: Callable[[], None] = lambda: None
        self._resumed: Waiters[None] = Waiters()
        self._paused = self._stopped = False

    @abstractmethod
    async def read(self) -> bytes:
        """Returns the next bytes, ``b""`` at the end."""

    @abstractmethod
    def close(self) -> None:
        """Closes what reading opened."""

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Fires once all has been written; fails if it cannot be read; never fires after
        ``stopProducing``.
        """
        done: Deferred[None] = Deferred(lambda _: self.stopProducing())

        def ended(outcome: Failure | None) -> None:
            if not self._stopped:
                done.callback(outcome)

        ensureDeferred(self._produce(consumer)).addBoth(ended)
        return done

    async def _produce(self, consumer: IConsumer) -> None:
        try:
            while chunk := await self.read():
                if self._paused and not self._stopped:
                    await self._resumed.wait()
                if self._stopped:
                    return
                consumer.write(chunk)
                self.progressed()
        finally:
            self.close()

    def pauseProducing(self) -> None:
        """Pauses the reading."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Resumes the reading."""
        self._paused = False
        self._resumed.fire(None)

    def stopProducing(self) -> None:
        """Ends the reading. May be called more than once."""
        self._stopped = True
        self._resumed.fire(None)


class BytesBody(Body):
    """A small body from memory (manifests; the empty body of a POST)."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        self._content = content

    async def read(self) -> bytes:
        """Returns all bytes at once."""
        content, self._content = self._content, b""
        return content

    def close(self) -> None:
        """Does nothing: no file is open."""


class FileBody(Body):
    """A file's first ``length`` bytes. The caller protects it from removal."""

    def __init__(self, path: Path, length: int, threads: Threads) -> None:
        super().__init__(length)
        self._path, self._threads, self._left = path, threads, length
        self._file: BinaryIO | None = None

    async def read(self) -> bytes:
        """Returns the available bytes; the HTTP client notices a file that is too short."""
        if self._file is None:
            self._file = await self._threads.run(self._path.open, "rb")
        chunk = await self._threads.run(self._file.read, min(CHUNK, self._left))
        self._left -= len(chunk)
        return chunk

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
