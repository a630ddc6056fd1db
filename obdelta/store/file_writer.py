"""Files that grow while they are read: one writer, many readers; in the end a verified file, or a
failure for all.

Everything produced while devices wait for it goes through here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from twisted.python.failure import Failure

from obdelta.concurrency.tasks import Threads, shielded
from obdelta.errors import Cancelled, DigestMismatch, SizeMismatch
from obdelta.oci import Digest
from obdelta.store import files
from obdelta.store.growing_file import GrowingFile, OpenFile

T = TypeVar("T")

Publish = Callable[[Path, Digest, int], Path]
"""``(temporary file, digest, size)`` to the final path: syncs and moves, in a thread. The bytes are
verified by then.
"""


class FileWriter(GrowingFile):
    """A file written by this process. The writer ends it with :meth:`finish` or :meth:`abort`; only
    then is it released.

    ``tmp`` must not exist. With a known ``length``, more bytes are refused, and fewer cannot be
    finished. Unless it is ``exact``, the file may end with another length. ``hashed``: the caller
    has verified the digest that it finishes with, and nothing is hashed again here. Satisfies the
    registry's ``Sink``. One call at a time. A cancelled wait leaves its call running: abort
    afterwards.
    """

    def __init__(
        self,
        tmp: Path,
        threads: Threads,
        publish: Publish,
        *,
        length: int | None = None,
        exact: bool = True,
        unverified_tail: int = 0,
        hashed: bool = False,
    ) -> None:
        super().__init__(threads, length=length, unverified_tail=unverified_tail)
        self._tmp, self._publish = tmp, publish
        with files.disk_full_as_error():
            self._descriptor = os.open(
                tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        self._file = self._own = OpenFile(self._descriptor, threads)
        self._busy = False
        # Shared with threads, under the lock: an abort must not overtake a write whose wait was
        # cancelled.
        self._lock = threading.Lock()
        self._expected_length = length if exact else None
        self._hash = None if hashed else hashlib.sha256()
        self._written = 0
        self._closed = False

    @property
    def temporary(self) -> Path:
        """Returns the path of the file until it is finished or aborted."""
        return self._tmp

    async def write(self, chunk: bytes) -> None:
        """Appends; resolves when the chunk is in the file and readable.

        Raises SizeMismatch (more than ``length``), StoreFull: the file has then failed for all and
        is removed. Cancelled after an abort.
        """
        await self._alone(lambda: self._append(chunk), self._grown)

    async def finish(
        self, expected_digest: Digest | None = None, expected_size: int | None = None
    ) -> Digest:
        """Compares, syncs and moves the whole file into place, and releases the unverified tail to
        readers. Returns the digest.

        Raises DigestMismatch, SizeMismatch, StoreFull: the file has then failed for all and is
        removed.
        """
        digest, _ = await self._alone(
            lambda: self._seal(expected_digest, expected_size),
            lambda sealed: self._completed(sealed[1]),
        )
        return digest

    async def abort(self, error: Exception | None = None) -> None:
        """Fails all readers with ``error`` and removes the file. No effect after the end."""
        reason = Failure(error if error is not None else Cancelled("the file was discarded"))

        def discarded(now: bool) -> None:
            if now:
                self._failed(reason)

        await shielded(self._threads.start(self._discard).addCallback(discarded))

    async def _alone(self, function: Callable[[], T], then: Callable[[T], None]) -> T:
        if self._busy:
            raise RuntimeError("a file writer takes one call at a time")
        self._busy = True

        def succeeded(outcome: T) -> T:
            self._busy = False
            then(outcome)
            return outcome

        def failed(failure: Failure) -> Failure:
            self._busy = False
            if self.failure is None and not self.complete:
                self._failed(failure)
            return failure

        return await shielded(self._threads.start(function).addCallbacks(succeeded, failed))

    # -- in threads

    def _append(self, chunk: bytes) -> int:
        with self._lock:
            self._refuse_closed()
            try:
                size = self._written + len(chunk)
                if self._expected_length is not None and size > self._expected_length:
                    raise SizeMismatch(self._expected_length, size, "file")
                rest = memoryview(chunk)
                with files.disk_full_as_error():
                    while rest:
                        rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:
                self._close_and_remove()
                raise
            if self._hash is not None:
                self._hash.update(chunk)
            self._written = size
            return size

    def _seal(
        self, expected_digest: Digest | None, expected_size: int | None
    ) -> tuple[Digest, Path]:
        with self._lock:
            self._refuse_closed()
            try:
                for size in (self._expected_length, expected_size):
                    if size is not None and size != self._written:
                        raise SizeMismatch(size, self._written, "file")
                if self._hash is not None:
                    digest = Digest(self._hash.hexdigest())
                elif expected_digest is not None:
                    digest = expected_digest
                else:
                    raise RuntimeError("a file writer that does not hash needs the digest")
                if expected_digest is not None and digest != expected_digest:
                    raise DigestMismatch(expected_digest, digest, "file")
                path = self._publish(self._tmp, digest, self._written)
            except BaseException:
                self._close_and_remove()
                raise
            self._closed = True
            return digest, path

    def _discard(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._close_and_remove()
            return True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Cancelled("the file was discarded")

    def _close_and_remove(self) -> None:
        self._closed = True
        self._tmp.unlink(missing_ok=True)


class ExternalFile(GrowingFile):
    """A file that another process writes (an rsync batch). The code that watches the process
    reports its progress.

    The watcher owns the file. It is opened on its first growth, and may be moved or removed later.
    ``name`` distinguishes one build of it from another. ``rest``: bytes still to come at most, None
    if unknown. ``tail``: bytes before its end that may be padding, for clients that were given a
    length; known when it is complete.
    """

    def __init__(
        self,
        path: Path,
        threads: Threads,
        *,
        length: int | None = None,
        unverified_tail: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(threads, length=length, unverified_tail=unverified_tail)
        self.path: Path = path
        self.name = name
        self.rest: int | None = None
        self.tail = 0

    def bound(self, share: float) -> int | None:
        """Returns an upper bound of its length, if it can fall short of that bound by at most
        ``share`` of it.
        """
        if self.rest is None or self.complete or self.failure is not None:
            return None
        length = self.size + self.rest
        return length if self.rest <= share * length else None

    def grew(self, size: int, rest: int | None = None) -> None:
        """Reports ``size`` bytes, which will not change any more. Raises Missing if there is no
        such file.
        """
        self._open()
        if size < self.size:
            raise ValueError("a growing file does not shrink")
        self.rest = rest
        self._grown(size)

    def finished(self, path: Path | None = None) -> None:
        """Reports a complete and valid file, now at ``path`` if it was moved.

        If its length differs from the announced one, it fails for all with SizeMismatch.
        """
        if path is not None:
            self.path = path
        size = os.fstat(self._open().descriptor).st_size
        if self.length is not None and size != self.length:
            self._failed(Failure(SizeMismatch(self.length, size, "file")))
            return
        self.size = size
        self._completed(self.path)

    def failed(self, error: Exception) -> None:
        """Reports that the file will never be complete. No effect after the end."""
        if not self.complete and self.failure is None:
            self._failed(Failure(error))

    def _open(self) -> OpenFile:
        if self.complete or self.failure is not None:
            raise RuntimeError("the file has ended already")
        if self._own is None:
            self._own = self.use()
        return self._own
