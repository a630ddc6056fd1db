"""The readers' side of a file that still grows: delivery to many consumers, each at its own pace.

One open file serves all readers, each at its own offset. Bytes in the page cache are read at once;
reads that wait for the disk run in a thread.
"""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.concurrency.tasks import Threads, Waiters
from obdelta.errors import Missing, SizeMismatch

CHUNK = 1 << 16
"""Bytes that a reader passes on at once; it holds no more than this."""


class OpenFile:
    """A descriptor with many users, closed after the last. Reactor thread only, though reads may
    run in threads.
    """

    def __init__(self, descriptor: int, threads: Threads) -> None:
        self.descriptor = descriptor
        self._threads = threads
        self._users = 1
        self._at_once = hasattr(os, "RWF_NOWAIT")

    def acquire(self) -> bool:
        """Adds a user; returns False if the file is closed."""
        if not self._users:
            return False
        self._users += 1
        return True

    def release(self) -> None:
        """Removes a user. Closing an unlinked file frees its blocks, which takes time and so runs
        in a thread.
        """
        self._users -= 1
        if not self._users:
            self._threads.start(os.close, self.descriptor)

    def read_at_once(self, offset: int, count: int) -> bytes | None:
        """Returns bytes that are in memory, ``b""`` at the end; None if the disk must be read."""
        if not self._at_once:
            return None
        buffer = bytearray(count)
        try:
            found = os.preadv(self.descriptor, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError:
            # Some file systems cannot do this (tmpfs): do not try again.
            self._at_once = False
            return None
        return bytes(memoryview(buffer)[:found])

    def read_in_thread(self, offset: int, count: int) -> Deferred[bytes]:
        """Reads plainly. The caller stays a user until the read is over."""
        return self._threads.start(os.pread, self.descriptor, count, offset)


class GrowingFile:
    """The file as readers see it. ``length`` is the total in bytes, None while it is unknown.

    ``unverified_tail``: bytes at the end that no reader gets before the whole file is verified. A
    file that fails, fails for all readers, including later ones.
    """

    def __init__(self, threads: Threads, *, length: int | None, unverified_tail: int) -> None:
        if unverified_tail < 0 or (length is not None and length < 0):
            raise ValueError("sizes are not negative")
        self.length = length
        self.size = 0
        self.complete = False
        self.failure: Failure | None = None
        self.path: Path | None = None
        self._unverified_tail = unverified_tail
        self._threads = threads
        self._file: OpenFile | None = None
        self._own: OpenFile | None = None
        self._readers: dict[_Reader, None] = {}
        self._waiters: Waiters[None] = Waiters()

    @property
    def available(self) -> int:
        """Returns how many bytes from the start may be read now."""
        if self.complete:
            return self.size
        known = self.size if self.length is None else self.length
        return max(0, min(self.size, known - self._unverified_tail))

    @property
    def readers(self) -> int:
        """Returns the number of active readers."""
        return len(self._readers)

    async def reached(self, offset: int) -> None:
        """Waits until more than ``offset`` bytes may be read, or the file is complete. Raises the
        file's failure.
        """
        while not self.complete and (self.failure is not None or self.available <= offset):
            await self._change()

    async def done(self) -> None:
        """Waits until the file is complete. Raises the file's failure."""
        while not self.complete:
            await self._change()

    def deliver(
        self, consumer: IConsumer, start: int = 0, stop: int | None = None
    ) -> Deferred[None]:
        """Streams bytes ``start`` to ``stop`` (exclusive; None: the end) as they arrive, at the
        consumer's pace.

        Registers a push producer and unregisters it at the end. The Deferred fires once, after the
        last byte; for a reader that reads to the end, after the file is verified. It fails with the
        file's failure, or with SizeMismatch if the file ends too early. It fails with Missing if
        the file was removed, and with CancelledError if the consumer stops or the Deferred is
        cancelled. Bytes may have been written before a failure: cut the connection.
        """
        if start < 0 or (stop is not None and stop < start):
            raise ValueError("a range does not run backwards")
        reader = _Reader(self, self._threads, consumer, start, stop)
        self._readers[reader] = None
        reader.begin()
        return reader.ended

    def use(self) -> OpenFile:
        """Returns the open file for one more user, who releases it. Raises Missing if it is
        gone.
        """
        if self._file is not None and self._file.acquire():
            return self._file
        if self.path is None:
            raise Missing("the file is not there yet")
        try:
            self._file = OpenFile(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), self._threads)
        except FileNotFoundError as error:
            raise Missing("the file was removed") from error
        return self._file

    def forget(self, reader: _Reader) -> None:
        """Removes a reader that has ended."""
        del self._readers[reader]

    # -- for the writer

    def _grown(self, size: int) -> None:
        self.size = size
        self._changed()

    def _completed(self, path: Path) -> None:
        self.complete, self.length, self.path = True, self.size, path
        self._changed()
        self._release_file()

    def _failed(self, failure: Failure) -> None:
        failure.cleanFailure()  # its frames would hold chunks
        self.failure = failure
        self._changed()
        self._release_file()

    def _release_file(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.release()

    def _changed(self) -> None:
        for reader in list(self._readers):
            reader.changed()
        self._waiters.fire(self.failure)

    def _change(self) -> Deferred[None]:
        return self._waiters.wait() if self.failure is None else fail(self.failure)


@implementer(IPushProducer)
class _Reader:
    """One delivery. Holds at most one chunk, and passes on one per turn, so that other readers get
    theirs.
    """

    def __init__(
        self,
        growing: GrowingFile,
        threads: Threads,
        consumer: IConsumer,
        start: int,
        stop: int | None,
    ) -> None:
        self.ended: Deferred[None] = Deferred(lambda _: self.stopProducing())
        self._growing, self._threads, self._consumer = growing, threads, consumer
        self._position, self._stop = start, stop
        self._file: OpenFile | None = None
        self._kept: bytes | None = None
        self._paused = self._busy = self._scheduled = self._over = False

    def begin(self) -> None:
        """Registers and starts; the consumer may pause or stop this reader at once."""
        self._consumer.registerProducer(self, True)
        self._step()

    def changed(self) -> None:
        """Continues after the file has grown, completed or failed."""
        self._step()

    def pauseProducing(self) -> None:
        """Pauses the delivery."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Continues the delivery."""
        self._paused = False
        self._step()

    def stopProducing(self) -> None:
        """Ends the delivery. May be called more than once, at any time."""
        self._end(Failure(CancelledError()))

    def _step(self) -> None:
        if self._over or self._busy or self._finished() or self._paused or self._scheduled:
            return
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self._write(kept)
            return
        limit = self._growing.available
        if self._stop is not None:
            limit = min(limit, self._stop)
        if self._position < limit:
            self._read(min(CHUNK, limit - self._position))

    def _finished(self) -> bool:
        """Ends the delivery if nothing more will come; returns whether it has ended."""
        growing, stop = self._growing, self._stop
        if growing.failure is not None:
            self._end(growing.failure)
        elif growing.complete:
            end = growing.size if stop is None else stop
            if max(end, self._position) > growing.size:
                self._end(Failure(SizeMismatch(max(end, self._position), growing.size, "file")))
            elif self._position >= end:
                self._end(None)
        elif stop is not None and self._position >= stop and stop != growing.length:
            self._end(None)
        return self._over

    def _read(self, count: int) -> None:
        try:
            if self._file is None:
                self._file = self._growing.use()
        except Missing:
            self._end(Failure())
            return
        content = self._file.read_at_once(self._position, count)
        if content is not None:
            self._write(content)
            return
        self._busy = True
        self._file.read_in_thread(self._position, count).addCallbacks(
            self._was_read, self._was_not_read
        )

    def _was_read(self, content: bytes) -> None:
        self._busy = False
        if self._over:
            self._release_file()
        else:
            # The reader may have been paused, or the file may have failed, during the disk read.
            self._kept = content
            self._step()

    def _was_not_read(self, failure: Failure) -> None:
        self._busy = False
        if self._over:
            self._release_file()
        else:
            self._end(failure)

    def _write(self, content: bytes) -> None:
        if not content:
            # Something else truncated the file.
            self._end(Failure(SizeMismatch(self._growing.size, self._position, "file")))
            return
        self._position += len(content)
        self._busy = True
        try:
            self._consumer.write(content)
        except Exception:
            # One broken consumer must not disturb other readers, nor the writer whose growth called
            # this.
            self._end(Failure())
        self._busy = False
        if self._over:
            self._release_file()
        elif not self._finished() and not self._paused:
            self._scheduled = True
            self._threads.soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._step()

    def _end(self, failure: Failure | None) -> None:
        if self._over:
            return
        self._over = True
        self._growing.forget(self)
        if not self._busy:
            self._release_file()
        self._consumer.unregisterProducer()
        if failure is None:
            self.ended.callback(None)
        else:
            self.ended.errback(failure)

    def _release_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.release()
