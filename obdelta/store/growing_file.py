"""A file that still grows and is read already: the readers' side.

One open file serves all readers, each at its own offset and pace. What the page cache holds is read
at once; what has to wait for the disk is read in a thread.
"""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.concurrency.threads import Threads
from obdelta.errors import Missing, SizeMismatch

CHUNK = 1 << 16
"""Bytes that a reader hands on at once; it holds no more than this."""


class OpenFile:
    """A descriptor with many users, closed after the last. Reactor thread only; reads may run in
    threads meanwhile.
    """

    def __init__(self, descriptor: int, threads: Threads) -> None:
        self.descriptor = descriptor
        self._threads = threads
        self._users = 1
        self._at_once = hasattr(os, "RWF_NOWAIT")

    def acquire(self) -> bool:
        """One user more; False: it is closed."""
        if not self._users:
            return False
        self._users += 1
        return True

    def release(self) -> None:
        """One user less. Closing an unlinked file frees its blocks, which takes time: in a thread."""
        self._users -= 1
        if not self._users:
            self._threads.start(os.close, self.descriptor)

    def read_at_once(self, offset: int, count: int) -> bytes | None:
        """What is in memory, some bytes or ``b""`` at the end; None when the disk has to be asked."""
        if not self._at_once:
            return None
        buffer = bytearray(count)
        try:
            found = os.preadv(self.descriptor, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError:
            # Not every file system can (tmpfs cannot): do not try again.
            self._at_once = False
            return None
        return bytes(memoryview(buffer)[:found])

    def read_in_thread(self, offset: int, count: int) -> Deferred[bytes]:
        """A plain read. The caller stays a user until it is over."""
        return self._threads.start(os.pread, self.descriptor, count, offset)


class GrowingFile:
    """What readers see. ``length`` is the total in bytes, None while it is unknown.

    ``unverified_tail``: so many bytes at the end are given to nobody before the whole file has been
    found good. A file that fails, fails for all readers, also for those who come later.
    """

    def __init__(self, threads: Threads, *, length: int | None, unverified_tail: int) -> None:
        if unverified_tail < 0 or (length is not None and length < 0):
            raise ValueError("sizes are not negative")
        self.length = length
        self.size = 0
        self.complete = False
        self.failure: Failure | None = None
        self.path: Path | None = None
        self._hold_back = unverified_tail
        self._threads = threads
        self._file: OpenFile | None = None
        self._own: OpenFile | None = None
        self._readers: dict[_Reader, None] = {}
        self._waiters: list[Deferred[None]] = []

    @property
    def available(self) -> int:
        """Bytes from the start that may be read by now."""
        if self.complete:
            return self.size
        known = self.size if self.length is None else self.length
        return max(0, min(self.size, known - self._hold_back))

    @property
    def readers(self) -> int:
        """How many are reading."""
        return len(self._readers)

    async def reached(self, offset: int) -> None:
        """Waits until more than ``offset`` bytes may be read, or the file is complete. Raises why
        it failed.
        """
        while not self.complete and (self.failure is not None or self.available <= offset):
            await self._change()

    async def done(self) -> None:
        """Waits until the file is complete. Raises why it failed."""
        while not self.complete:
            await self._change()

    def deliver(
        self, consumer: IConsumer, start: int = 0, stop: int | None = None
    ) -> Deferred[None]:
        """Streams bytes ``start`` to ``stop`` (exclusive; None: the end), as they come, at the
        consumer's pace.

        Registers a push producer and unregisters it at the end. The Deferred fires once: after the
        last byte (of a reader that goes to the file's end: after the file has been found good,
        too), with the failure of the file, with SizeMismatch when the file ends too early, with
        Missing when it was removed, or with CancelledError when the consumer stops or the Deferred
        is cancelled. After a failure bytes may have been written: cut the connection.
        """
        if start < 0 or (stop is not None and stop < start):
            raise ValueError("a range does not run backwards")
        reader = _Reader(self, self._threads, consumer, start, stop)
        self._readers[reader] = None
        reader.begin()
        return reader.ended

    def use(self) -> OpenFile:
        """The open file, for one more user, who releases it. Raises Missing when it is gone."""
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
        """A reader has ended."""
        del self._readers[reader]

    # -- for the writer's side
    # ----------------------------------------------------------------------------------

    def _grown(self, size: int) -> None:
        self.size = size
        self._changed()

    def _completed(self, path: Path) -> None:
        self.complete, self.length, self.path = True, self.size, path
        self._changed()
        self._let_go()

    def _failed(self, failure: Failure) -> None:
        failure.cleanFailure()  # its frames would hold chunks
        self.failure = failure
        self._changed()
        self._let_go()

    def _let_go(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.release()

    def _changed(self) -> None:
        for reader in list(self._readers):
            reader.changed()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if self.failure is not None:
                waiter.errback(self.failure)
            else:
                waiter.callback(None)

    def _change(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        if self.failure is not None:
            waiter.errback(self.failure)
        else:
            self._waiters.append(waiter)
        return waiter


@implementer(IPushProducer)
class _Reader:
    """One delivery. Holds at most one chunk; hands on one a turn, so that others get theirs."""

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
        """Registers and starts; the consumer may pause or stop us at once."""
        self._consumer.registerProducer(self, True)
        self._step()

    def changed(self) -> None:
        """The file has grown, is complete or has failed."""
        self._step()

    def pauseProducing(self) -> None:
        """The consumer has enough for now."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The consumer can take more."""
        self._paused = False
        self._step()

    def stopProducing(self) -> None:
        """The consumer is gone. May come more than once, at any time."""
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
        """Ends when there is nothing more to come; whether it is over."""
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
            self._let_go()
        else:
            # It may have been paused, or the file may have failed, while the disk was asked.
            self._kept = content
            self._step()

    def _was_not_read(self, failure: Failure) -> None:
        self._busy = False
        if self._over:
            self._let_go()
        else:
            self._end(failure)

    def _write(self, content: bytes) -> None:
        if not content:
            # Somebody cut the file short under our eyes.
            self._end(Failure(SizeMismatch(self._growing.size, self._position, "file")))
            return
        self._position += len(content)
        self._busy = True
        try:
            self._consumer.write(content)
        except Exception:
            # One broken consumer must not disturb the other readers, nor the writer whose growth
            # brought us here.
            self._end(Failure())
        self._busy = False
        if self._over:
            self._let_go()
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
            self._let_go()
        self._consumer.unregisterProducer()
        if failure is None:
            self.ended.callback(None)
        else:
            self.ended.errback(failure)

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.release()
